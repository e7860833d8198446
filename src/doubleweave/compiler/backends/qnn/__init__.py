"""Qualcomm's NPUs: quantized on real inputs, lowered to HTP context binaries.

Imports compiler.backends, compiler.quantize and vendors; knows nothing of other backends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from doubleweave.compiler.backends.backend import Backend, Option, late
from doubleweave.errors import PolicyError
from doubleweave.vendors.qnn_sdk import SOCS, find_sdk, keep_from_downloading

BLOCKS = "16a4w_block"
NARROW = (BLOCKS, "16a4w")  # recipes of 4 bits


def _check(recipe: str, attention: str, own: Mapping[str, Any]) -> Mapping[str, Any]:
    if not own["soc"]:
        raise PolicyError("soc: qnn compiles for one chip; name it, such as SM8650")
    if own["attention_device"] == "npu" and attention != "dynamic":
        raise _ATTENTION_DEVICE.misplaced("npu", "qnn", attention, "qnn")
    if own["budget"] is not None and recipe not in NARROW:
        raise PolicyError(f"budget: found it for {recipe}, expected one of {', '.join(NARROW)}; leave it out")
    budget = None if own["budget"] is None else _budget(own["budget"])
    find_sdk()  # its errors come before the work
    keep_from_downloading()
    return {**own, "budget": budget}


def _budget(given: object) -> float:
    try:
        budget = float(str(given))
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise PolicyError(
            f"budget: found {given!r}, expected how much perplexity may rise, such as 0.05 for 5 percent"
        )
    return budget


_ATTENTION_DEVICE = Option(
    "attention_device",
    "cpu (default), or npu to ask QNN for dynamic attention on the NPU",
    default="cpu",
    metavar="DEVICE",
    choices=("cpu", "npu"),
    elsewhere="{option}: found {value!r} with {attention} attention for {backend}; expected dynamic attention for "
    "{owner} (static attention is where the static segments are)",
)

BACKEND = Backend(
    "qnn",
    to_edge=late(f"{__name__}.lower", "to_edge"),
    way_out="keep it on the CPU: --keep {}=cpu",
    about="Qualcomm's NPU, on x86 its emulator",
    recipes={
        "16a8w": "16-bit activations, 8-bit weights",
        BLOCKS: "4-bit weights in blocks of 32",
        "16a4w": "4-bit weights, one scale an output feature",
        "8a8w": "",
    },
    options=(
        Option(
            "soc",
            f"the chip to compile for: {', '.join(SOCS[:-1])} or {SOCS[-1]}",
            metavar="SOC",
            choices=SOCS,
        ),
        Option(
            "calibrate",
            "the text, or JSON list of token ids, to find the scales with (default: a text of the package)",
            metavar="FILE",
        ),
        Option(
            "keep",
            "another recipe for the segments of this name or pattern, or cpu; may be repeated",
            kind="pairs",
            default={},
            metavar="PATTERN=RECIPE",
            example="block_*=16a8w",
        ),
        Option(
            "budget",
            "how much perplexity may rise on the calibration text, such as 0.05: as few segments of 4 bits as hold it "
            "get 16a8w",
            metavar="PART",
        ),
        Option(
            "emulate",
            "for the emulator on this machine, in which methods cannot share weights as they do on the chip",
            kind="flag",
            default=False,
        ),
        _ATTENTION_DEVICE,
    ),
    takes_fixed_sizes_only=True,
    check=_check,
    place=late(f"{__name__}.place", "place"),
    rounding=late(f"{__name__}.place", "rounding"),
    quieter=lambda segment: f"--keep {segment.name}={'cpu' if segment.recipe == '16a8w' else '16a8w'}",
    # The scores are quantized: less would take the steps of the scale, and ExecuTorch's Qualcomm examples say that this
    # leaves a hidden key no weight.
    hidden_score=-255.0,
)
