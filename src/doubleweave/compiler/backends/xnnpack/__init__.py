"""XNNPACK: the default on every CPU, and the stand-in for an NPU where there is none."""

from __future__ import annotations

from doubleweave.compiler.backends.backend import Backend, late

_LOWER = f"{__name__}.lower"

BACKEND = Backend(
    "xnnpack",
    to_edge=late(_LOWER, "to_edge"),
    prepare=late(_LOWER, "prepare"),
    serialized=late(f"{__name__}.unread", "serialized"),
    about="any CPU",
    recipes={"8da8w": "8-bit weights", "8da4w": "4-bit weights in groups of 32", "none": "float32"},
    place=late(_LOWER, "place"),
    rounding=late("doubleweave.compiler.quantize.weights", "rounding"),
)
