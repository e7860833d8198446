"""The task graph of a run: the calls that each chunk needs, the tasks that each task waits for, and the buffers.

The native module repeats the pattern of a chunk (pattern.py) for the chunks of a prompt. Arrays in the place of task
objects keep that to milliseconds for thousands of chunks. It knows nothing of workers, threads or torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from doubleweave import _scheduling
from doubleweave.ir.split import Split
from doubleweave.schedule import scratch_groups
from doubleweave.schedule.buffer_slots import Slots, assign
from doubleweave.schedule.chunks import Chunk
from doubleweave.schedule.pattern import Int32Array, Want, pattern_of


class Task(NamedTuple):
    """One call for one chunk; the unit a schedule places."""

    call: int
    chunk: int


@dataclass(frozen=True)
class TaskGraph:
    """Tasks chunk behind chunk, an order that can run with one chunk in flight.

    `call_of` and `chunk_of`, int32 [n], are the tasks. Task t waits for the tasks
    `after_list[after_starts[t]:after_starts[t + 1]]`. `slots` are the buffers of one chunk; a lane has a copy of each,
    of `lane_bytes[slot]` bytes, and `lanes` chunks may be in flight.
    """

    split: Split
    chunks: tuple[Chunk, ...]
    want: Want
    call_of: Int32Array
    chunk_of: Int32Array
    after_starts: Int32Array
    after_list: Int32Array
    slots: Slots
    lanes: int
    lane_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.call_of)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        # Built when first asked for: planning works on the arrays, and a long prompt has a hundred thousand tasks.
        return tuple(map(Task, self.call_of.tolist(), self.chunk_of.tolist()))

    @cached_property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """The tasks that each task waits for."""
        return lists_of(self.after_starts, self.after_list)

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The device of each call."""
        return tuple(self.split.segment(call.segment).device for call in self.split.calls)

    @cached_property
    def device_of(self) -> tuple[str, ...]:
        """The device of each task."""
        return tuple(self.devices[call] for call in self.call_of.tolist())

    @cached_property
    def every_device(self) -> tuple[str, ...]:
        """The devices, in order of first use."""
        return tuple(dict.fromkeys(self.devices))

    @cached_property
    def native(self) -> _scheduling.Tasks:
        # Native code knows no calls, so each task carries the number of its device.
        place = [self.every_device.index(device) for device in self.devices]
        device = np.array(place, np.int32)[self.call_of]
        return _scheduling.Tasks(
            self.call_of, self.chunk_of, self.after_starts, self.after_list, device, self.every_device
        )

    def buffer(self, value: str, chunk: int) -> int:
        """The number of the buffer that holds a value of a chunk."""
        if value in self.slots.of:
            return chunk % self.lanes * len(self.lane_bytes) + self.slots.of[value]
        outputs = self.slots.outputs
        # "last" keeps one set of outputs, "all" one for each chunk.
        place = 0 if len(self.output_bytes) == len(outputs) else chunk * len(outputs)
        return self.lanes * len(self.lane_bytes) + place + outputs.index(value)

    @property
    def buffer_bytes(self) -> tuple[int, ...]:
        """The size of each buffer: those of the lanes, then the outputs of the last chunk or of every chunk."""
        return self.lane_bytes * self.lanes + self.output_bytes

    def name(self, index: int) -> str:
        """A task's text form: call, first token, tokens, compiled size: "block_0/128+100@128"."""
        start, tokens, size = self.chunks[self.chunk_of[index]]
        return f"{self.split.calls[self.call_of[index]].name}/{start}+{tokens}@{size}"


def lists_of(starts: Int32Array, flat: Int32Array) -> tuple[tuple[int, ...], ...]:
    """The lists that lie one behind the other in `flat`, int32 [m]: list i from `starts[i]` to `starts[i + 1]`."""
    found = flat.tolist()
    return tuple(tuple(found[a:b]) for a, b in pairwise(starts.tolist()))


def build(
    split: Split, chunks: tuple[Chunk, ...], want: Want, in_flight: int = 1, *, abreast: int = 1
) -> TaskGraph:
    """Build the task graph with buffers for `in_flight` chunks at once; chunk c takes over those of c - in_flight.

    `abreast` chunks may be in static segments at once; their dependencies keep them apart in scratch memory.
    """
    pattern = pattern_of(split, want)
    scratch = _scheduling.Scratch(scratch_groups.blocks(split), scratch_groups.num_groups(split))
    call_of, chunk_of, starts, found, lanes = _scheduling.repeat(
        pattern.native, scratch, chunks, in_flight, abreast
    )
    slots = assign(split)
    # Lanes are alike, so each has room for the largest chunk, padding included.
    rows = max(chunk.compiled_size for chunk in chunks)
    values, writer = {value.name: value for value in split.values}, split.writer()
    # Where one row of logits is read, there is room for one: a row takes 192 KiB with a vocabulary of 49,152.
    outputs = tuple(
        values[name].row_bytes * (1 if want == "last" and split.calls[writer[name]].rows == "last" else rows)
        for name in slots.outputs
    )
    lane_bytes = tuple(size * rows for size in slots.row_bytes)
    output_bytes = outputs * (len(chunks) if want == "all" else 1)
    return TaskGraph(
        split, chunks, want, call_of, chunk_of, starts, found, slots, lanes, lane_bytes, output_bytes
    )
