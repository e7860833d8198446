"""Cut calls into steps: a segment of fixed sizes runs chunk by chunk, with copies where rows do not lie in place.

Most chunks are read and written where their rows lie; only the last, padded chunk is copied, and rows of an inner axis,
which do not lie one behind the other. The copies are steps of the native executor, so that no Python runs between
tasks. This file knows nothing of functions or buffers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from doubleweave.ir.split import ITEM_BYTES, ROWS, Port
from doubleweave.schedule.chunks import Chunk
from doubleweave.schedule.inline_functions import Flat, FlatCall
from doubleweave.schedule.module_steps import Copy, Step, Tensor, View


def cut_calls(flat: Flat) -> tuple[list[Tensor], list[Step], tuple[int, ...]]:
    """Make steps of flat calls: (the tensors of a run in the order in which it meets them, its steps, the tensors of
    its results). Staged tensors stand behind the tensors of their call."""
    tensors: list[Tensor] = []
    numbers: list[int] = []  # the number among `tensors` of each tensor of `flat`
    steps: list[Step] = []

    def meet(end: int) -> None:
        # In the order of use: staged tensors come in between, so tensors of `flat` get new numbers.
        for tensor in flat.tensors[len(numbers) : end]:
            numbers.append(len(tensors))
            tensors.append(tensor)

    for call in flat.calls:
        meet(max(call.reads + call.writes) + 1)
        if call.chunks:
            steps += _chunk_by_chunk(call, numbers, tensors)
        else:
            steps.append(_at_once(call, numbers, tensors))
    meet(len(flat.tensors))
    return tensors, steps, tuple(numbers[tensor] for tensor in flat.outputs)


def _at_once(call: FlatCall, numbers: Sequence[int], tensors: Sequence[Tensor]) -> Step:
    if call.segment is None:
        source, target = numbers[call.reads[0]], numbers[call.writes[0]]
        size = tensors[source].num_bytes
        return Step(call.name, "", "", "cpu", 0, copy=Copy(source, target, 0, size, 0, size, 1, size, 0))
    reads, writes = (
        tuple(View(numbers[tensor], tensors[numbers[tensor]].sizes) for tensor in side)
        for side in (call.reads, call.writes)
    )
    name = call.segment.name
    return Step(call.name, name, name, call.segment.device, 0, reads, writes)


def _chunk_by_chunk(call: FlatCall, numbers: Sequence[int], tensors: list[Tensor]) -> Iterator[Step]:
    """The steps of a call in chunks; appends the tensors that it stages rows in."""
    segment = call.segment
    assert segment is not None
    ports = (*segment.inputs, *segment.outputs)
    # A chunk reads the state that the chunk before it wrote, so the state's two buffers change places at every chunk.
    other = {tensor: after for pair in call.swaps for tensor, after in (pair, pair[::-1])}
    for index, chunk in enumerate(call.chunks):
        used = [other.get(t, t) if index % 2 else t for t in call.reads + call.writes]
        views = [_chunk_view(p, numbers[t], index, chunk, tensors) for p, t in zip(ports, used, strict=True)]
        reads, writes = views[: len(call.reads)], views[len(call.reads) :]
        step = Step(call.name, segment.name, "", segment.device, index)
        yield from [step._replace(copy=found.into) for found in reads if found.into]
        yield step._replace(
            method=f"{segment.name}@{chunk.compiled_size}",
            reads=tuple([found.view for found in reads]),
            writes=tuple([found.view for found in writes]),
        )
        yield from [step._replace(copy=found.back) for found in writes if found.back]


class _ChunkView(NamedTuple):
    """A chunk's rows of a tensor; where they are staged beside it, the copies there and back."""

    view: View
    into: Copy | None = None
    back: Copy | None = None


def _chunk_view(port: Port, tensor: int, index: int, chunk: Chunk, tensors: list[Tensor]) -> _ChunkView:
    if ROWS not in port.shape:
        return _ChunkView(View(tensor, tensors[tensor].sizes))
    name, dtype, sizes, *_ = tensors[tensor]
    start, count, size = chunk
    axis = port.shape.index(ROWS)
    # Rows of an inner axis lie in as many blocks as the outer axes have places.
    num_blocks, rows = math.prod(sizes[:axis]), sizes[axis]
    row_bytes = math.prod(sizes[axis + 1 :]) * ITEM_BYTES[dtype]
    chunk_sizes = (*sizes[:axis], size, *sizes[axis + 1 :])
    # The rows lie one behind the other, and there are as many as compiled.
    if num_blocks == 1 and count == size:
        return _ChunkView(View(tensor, chunk_sizes, start * row_bytes))
    staged = len(tensors)
    tensors.append(Tensor(f"{name}/{index}", dtype, chunk_sizes))
    begin, stride, staged_stride = start * row_bytes, rows * row_bytes, size * row_bytes
    block, padding = count * row_bytes, (size - count) * row_bytes
    return _ChunkView(
        View(staged, chunk_sizes),
        # Padding is zeros, not what the buffer held before: rows may be indices.
        into=Copy(tensor, staged, begin, stride, 0, staged_stride, num_blocks, block, padding),
        back=Copy(staged, tensor, 0, staged_stride, begin, stride, num_blocks, block, 0),
    )
