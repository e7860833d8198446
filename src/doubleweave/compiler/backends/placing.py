"""Which segments go to an NPU's backend, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from doubleweave.compiler.graph.static_attention import MASK
from doubleweave.compiler.policy import DEFAULT_BACKEND
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import FixedSizes, Segment, most_rows, rows


def fits(segment: Segment) -> bool:
    """Whether it is meant for the NPU and can go there: float32 in and out.

    Lookups by token or position (int64 inputs) stay on the CPU: they compute next to nothing, and a table in an NPU's
    memory is read from the system's all the same.
    """
    ports = (*segment.inputs, *segment.outputs)
    return segment.device == "npu" and all(port.dtype == "float32" for port in ports)


def placed(
    torch_split: TorchSplit, recipes: Mapping[str, str], backend: str, target: str, *, shares_context: bool
) -> TorchSplit:
    """The segments in `recipes` on the backend, with one context each if `shares_context`, else one a method; the
    other static ones on the CPU."""
    segments = []
    for segment in torch_split.split.segments:
        if segment.name in recipes:
            segment = replace(
                segment,
                backend=backend,
                target=target,
                recipe=recipes[segment.name],
                contexts=1 if shares_context else len(segment.methods()),
            )
        elif isinstance(segment.shape, FixedSizes):
            # A mask has to hide the rows of padding too, so it is worked out for all of the NPU's rows; inlined
            # attention takes fixed sizes wherever it runs.
            is_fixed = segment.name == MASK or segment.attended_width > 0
            shape = segment.shape if is_fixed else rows(1, most_rows(segment.shape))
            segment = replace(segment, device="cpu", backend=DEFAULT_BACKEND, shape=shape)
        segments.append(segment)
    return replace(torch_split, split=replace(torch_split.split, segments=tuple(segments)))
