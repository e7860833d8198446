"""Find the segment that is wrong: each method of a program against eager torch, each value in chunks against at once.

Knows nothing of sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doubleweave.check.differences import noise
from doubleweave.compiler.graph.cache_rows import as_float
from doubleweave.compiler.split.eager import row_by_row, run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import CACHED, ROWS, Call, FixedSizes, Port, Segment

# Kernels that add up in another order make less noise.
_BY_ROUNDING = 1e-4
# Noise of a quantized segment against eager torch on the same inputs, where a number between two steps of the
# activations' scale was rounded the other way. Wrong weights give about 1.
SEGMENT_BOUND, MOST_BOUND = 0.05, 0.2


class Noise(NamedTuple):
    """How far a segment's method is from eager torch on the same inputs, and how far it may be."""

    segment: str
    size: float
    bound: float

    @property
    def excess(self) -> float:
        return self.size / self.bound


def bound_of(segment: Segment) -> float:
    """Fixed scales with few steps make more noise in each operator: twice what the recipe itself adds to float32."""
    if segment.snr_db is None:
        return SEGMENT_BOUND
    return min(max(SEGMENT_BOUND, 2 * 10 ** (-segment.snr_db / 20)), MOST_BOUND)


def noisiest(
    torch_split: TorchSplit, methods: Mapping[str, Callable[..., Any]], chunks: Sequence[Tensor]
) -> Noise:
    """The segment whose method is furthest from eager torch, over these chunks of token ids, int64 [1, T] each.

    A method gets the inputs that eager torch computed, so noise of earlier segments does not count.
    """
    comparison = Comparison(torch_split, methods)
    for _ in run_chunks(torch_split, chunks, on_call=comparison):
        pass
    return comparison.worst


class Comparison:
    """Called with each call of a run in eager torch: runs the segment's method on what the call read.

    With `sizes` it runs on the first so many rows of a first chunk, one size after the other, and otherwise on all rows
    of a chunk at once. Where the first rows differ and no rows meet, the median of three places counts. `bound` takes
    the place of each segment's own. `worst` is the segment that was furthest from eager torch so far.
    """

    def __init__(
        self,
        torch_split: TorchSplit,
        methods: Mapping[str, Callable[..., Any]],
        sizes: Sequence[int] = (),
        bound: float | None = None,
    ) -> None:
        self.worst = Noise("", 0.0, SEGMENT_BOUND)
        self._split, self._methods, self._sizes, self._bound = torch_split.split, methods, sizes, bound

    def __call__(self, call: Call, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        segment = self._split.segment(call.segment)
        # A recurrence's states are those behind all rows.
        for size in self._sizes if self._sizes and not segment.each_row else (None,):
            found = self._noise(call, segment, read, written, size, 0)
            # One number that was rounded the other way may outweigh a row of small ones; wrong weights show in any row.
            if size and found.excess > 1 and not any(CACHED in port.shape for port in segment.inputs):
                more = [self._noise(call, segment, read, written, size, size * n) for n in (1, 2)]
                found = sorted((found, *more), key=lambda each: each.excess)[1]
            self.worst = max(self.worst, found, key=lambda each: each.excess)

    def _noise(
        self,
        call: Call,
        segment: Segment,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        size: int | None,
        start: int,
    ) -> Noise:
        """The noise of the noisiest result over so many rows (None: all) behind the first `start`."""
        inputs, wanted = (
            [_some_rows(tensor, port, start, size) for tensor, port in zip(tensors, ports, strict=True)]
            for tensors, ports in ((read, segment.inputs), (written, segment.outputs))
        )
        run = self._runner(_method(segment, inputs), len(wanted))
        results = row_by_row(run, call, segment, inputs) if segment.each_row else run(*inputs)
        pairs = zip(results, wanted, strict=True)
        sizes = [noise(_numbers(result), _numbers(value)) for result, value in pairs]
        return Noise(call.name, max(sizes), self._bound or bound_of(segment))

    def _runner(self, name: str, num_results: int) -> Callable[..., Sequence[Tensor]]:
        def run(*inputs: Tensor) -> Sequence[Tensor]:
            results = self._methods[name](*(tensor.contiguous() for tensor in inputs))
            return results if num_results > 1 else (results,)

        return run


def _numbers(tensor: Tensor) -> Tensor:
    """Rows of a cache in int8 as the numbers that they stand for."""
    return as_float(tensor) if tensor.dtype == torch.int8 else tensor


def _some_rows(tensor: Tensor, port: Port, start: int, size: int | None) -> Tensor:
    """Rows of a tensor with rows; nothing behind the first ones changes them, in attention either."""
    for axis, symbol in enumerate(port.shape):
        if size is not None and symbol in (ROWS, CACHED):
            first = min(start, max(0, tensor.shape[axis] - size))
            tensor = tensor.narrow(axis, first, min(size, tensor.shape[axis]))
    return tensor


def _method(segment: Segment, inputs: Sequence[Tensor]) -> str:
    """The name of the segment's method for inputs of these sizes."""
    by_size = {size: name for name, size in segment.methods().items()}
    if segment.each_row:
        return by_size[1]
    if not isinstance(segment.shape, FixedSizes):
        return by_size[None]
    ports = zip(inputs, segment.inputs, strict=True)
    rows = next((tensor.shape[port.shape.index(ROWS)] for tensor, port in ports if ROWS in port.shape), None)
    return by_size[rows]


def meeting_rows(torch_split: TorchSplit, chunks: Sequence[Tensor]) -> str | None:
    """The first call that gives other results for these chunks than for their tokens at once; None without one."""
    at_once, in_chunks = _results(torch_split, [torch.cat(list(chunks), 1)]), _results(torch_split, chunks)
    segments = {call.name: torch_split.split.segment(call.segment) for call in torch_split.split.calls}
    for call, (wanted,) in at_once.items():
        for number, (value, port) in enumerate(zip(wanted, segments[call].outputs, strict=True)):
            parts = [written[number] for written in in_chunks[call]]
            found = torch.cat(parts, port.shape.index(ROWS)) if ROWS in port.shape else parts[-1]
            if not noise(found, value) <= _BY_ROUNDING:
                return call
    return None


def _results(torch_split: TorchSplit, chunks: Sequence[Tensor]) -> dict[str, list[Sequence[Tensor]]]:
    """What each call wrote, chunk by chunk."""
    found: dict[str, list[Sequence[Tensor]]] = {}
    for _ in run_chunks(
        torch_split,
        chunks,
        on_call=lambda call, read, written: found.setdefault(call.name, []).append(written),
    ):
        pass
    return found
