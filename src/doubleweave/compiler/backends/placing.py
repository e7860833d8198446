"""Place segments on an NPU's backend, and the segments that it does not take on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from doubleweave.compiler.graph.static_attention import MASK
from doubleweave.compiler.policy import DEFAULT_BACKEND
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import FixedSizes, Segment, most_rows, rows


def fits(segment: Segment) -> bool:
    """Whether a segment is meant for the NPU and can go there: float32 in and out, and no experts to choose from.

    Lookups by token or position (int64 inputs) stay on the CPU: they compute next to nothing, and a table in an NPU's
    memory is read from the system's all the same. So do experts: an NPU, whose every shape is fixed, would compute all.
    """
    ports = (*segment.inputs, *segment.outputs)
    is_float = all(port.dtype == "float32" for port in ports)
    return segment.device == "npu" and is_float and not segment.expert_weights


def placed(
    torch_split: TorchSplit, recipes: Mapping[str, str], backend: str, target: str, *, shares_context: bool
) -> TorchSplit:
    """Put the segments in `recipes` on the backend, and the other segments of fixed sizes on the CPU.

    With `shares_context` a segment's methods are in one context, else each has a context of its own.
    """

    def place(segment: Segment) -> Segment:
        if segment.name in recipes:
            contexts = 1 if shares_context else len(segment.methods())
            recipe = recipes[segment.name]
            return replace(segment, backend=backend, target=target, recipe=recipe, contexts=contexts)
        if not isinstance(segment.shape, FixedSizes) or segment.each_row:
            return segment
        # A mask has to hide the rows of padding too, so it is worked out for all of the NPU's rows; inlined
        # attention takes fixed sizes wherever it runs.
        is_fixed = segment.name == MASK or segment.attended_width > 0
        shape = segment.shape if is_fixed else rows(1, most_rows(segment.shape))
        return replace(segment, device="cpu", backend=DEFAULT_BACKEND, shape=shape)

    return with_segments(torch_split, place)


def with_segments(torch_split: TorchSplit, change: Callable[[Segment], Segment]) -> TorchSplit:
    """The split with each segment changed; graphs and weights stay."""
    segments = tuple(map(change, torch_split.split.segments))
    return replace(torch_split, split=replace(torch_split.split, segments=segments))
