"""OpenVINO: Intel's NPUs and GPUs, and CPUs. Fixed sizes, in float32 or with 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doubleweave.compiler.backends.backend import Backend, Option, late
from doubleweave.vendors.openvino import DEVICES, check_device, check_nncf

_LOWER = f"{__name__}.lower"


def _check(recipe: str, attention: str, own: Mapping[str, Any]) -> Mapping[str, Any]:
    device = own["device"] or "CPU"
    check_device(device)
    if recipe != "none":
        check_nncf()
    return {"device": device}


BACKEND = Backend(
    "openvino",
    to_edge=late(_LOWER, "to_edge"),
    prepare=late("doubleweave.compiler.backends.plain_rotary", "without_rotary"),
    way_out="compile it for XNNPACK: --backend xnnpack --shape static",
    about="Intel's chips",
    recipes={"8w": "8-bit weights", "none": ""},
    options=(Option("device", "CPU (default), GPU or NPU", metavar="DEVICE", choices=DEVICES),),
    takes_fixed_sizes_only=True,
    check=_check,
    place=late(_LOWER, "place"),
)
