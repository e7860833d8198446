"""XNNPACK: the default on every CPU, and the stand-in for an NPU where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doubleweave.compiler.backends.backend import Backend, Option, late
from doubleweave.compiler.policy import KEPT_FORMATS
from doubleweave.errors import PolicyError

_LOWER = f"{__name__}.lower"


def _check(recipe: str, attention: str, own: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := sorted(set(own["keep"].values()) - {*KEPT_FORMATS}):
        raise PolicyError(f"keep: found {unknown[0]!r}, expected one of {', '.join(KEPT_FORMATS)}")
    if own["keep"] and recipe == "none":
        raise PolicyError("keep: found it for recipe none, which keeps every weight as it is; leave it out")
    return own


BACKEND = Backend(
    "xnnpack",
    to_edge=late(_LOWER, "to_edge"),
    prepare=late(_LOWER, "prepare"),
    serialized=late(f"{__name__}.unread", "serialized"),
    about="any CPU",
    recipes={"8da8w": "8-bit weights", "8da4w": "4-bit weights in groups of 32", "none": "float32"},
    options=(
        Option(
            "keep",
            f"what the linears of a role, a segment or a pattern are kept in ({', '.join(KEPT_FORMATS)}), whatever the "
            "recipe says; roles are q, k, v, o, gate, up, down and head, inspect shows them; may be repeated",
            kind="pairs",
            default={},
            metavar="PATTERN=FORMAT",
            example="down=int8",
        ),
    ),
    check=_check,
    place=late(_LOWER, "place"),
    rounding=late(_LOWER, "rounding"),
)
