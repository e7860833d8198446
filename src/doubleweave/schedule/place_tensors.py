"""Place the tensors of a run in buffers: a buffer is free again after the last step that uses its tensor.

A module's run is in order and its sizes are known, so buffers take any tensor that fits, unlike the slots of a language
model's chunks (buffer_slots.py). This file knows nothing of calls or chunks, only of steps and tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from doubleweave.schedule.module_steps import Step, Tensor


def place_tensors(
    tensors: Sequence[Tensor], steps: Sequence[Step]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors with their readers, writers and buffers, and the sizes of the buffers in bytes."""
    writers: list[list[int]] = [[] for _ in tensors]
    readers: list[list[int]] = [[] for _ in tensors]
    for number, step in enumerate(steps):
        for view in step.reads:
            readers[view.tensor].append(number)
        for view in step.writes:
            writers[view.tensor].append(number)
        if step.copy is not None:
            readers[step.copy.source].append(number)
            writers[step.copy.target].append(number)
    buffers, buffer_bytes = _assign(tensors, writers, readers, len(steps))
    placed = tuple(
        tensor._replace(
            number=buffers.get(index, tensor.number),
            writers=tuple(writers[index]),
            readers=tuple(readers[index]),
        )
        for index, tensor in enumerate(tensors)
    )
    return placed, tuple(buffer_bytes)


def _assign(
    tensors: Sequence[Tensor], writers: list[list[int]], readers: list[list[int]], num_steps: int
) -> tuple[dict[int, int], list[int]]:
    """The buffer of each tensor of the run, and the buffers' sizes in bytes: best fit, in the order of steps."""
    begins: list[list[int]] = [[] for _ in range(num_steps)]
    ends: list[list[int]] = [[] for _ in range(num_steps)]
    for index, tensor in enumerate(tensors):
        if tensor.place == "buffer" and (written := writers[index]):
            begins[written[0]].append(index)
            ends[max(written + readers[index])].append(index)
    buffers: dict[int, int] = {}
    sizes: list[int] = []
    free: list[int] = []
    for beginning, ending in zip(begins, ends, strict=True):
        # Tensors that a step writes are placed before its reads are freed: a method may write before it has read all.
        for index in beginning:
            size = tensors[index].num_bytes
            if free:  # growing the largest takes fewer bytes than another buffer
                fitting = [buffer for buffer in free if sizes[buffer] >= size]
                buffer = min(fitting, key=sizes.__getitem__) if fitting else max(free, key=sizes.__getitem__)
                free.remove(buffer)
                sizes[buffer] = max(size, sizes[buffer])
            else:
                buffer = len(sizes)
                sizes.append(size)
            buffers[index] = buffer
        free += [buffers[index] for index in ending]
    return buffers, sizes
