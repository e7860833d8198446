"""The task graph of a run: which calls are needed for which chunks, and what each waits for.

Tasks nobody needs are never listed: they are found by walking back from what is asked for. Buffers are
assigned here too, because reusing one is a dependency. All chunks but the last are alike, so dependencies are
found once for a chunk and repeated. It knows nothing of workers, threads or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from doubleweave import _scheduling
from doubleweave.ir.split import SizeRanges, Split
from doubleweave.schedule import scratch_groups
from doubleweave.schedule.buffer_slots import Slots, assign, users
from doubleweave.schedule.chunks import Chunk

Want = Literal["last", "all"]
# Stands for the chunk whose buffers a chunk takes over: as many before as there are lanes. So a pattern is the same for
# every number of lanes (native/scheduling/task_graph.h).
LANE_BEFORE = 1
Int32Array = npt.NDArray[np.int32]


class Task(NamedTuple):
    """One call for one chunk; the unit a schedule places."""

    call: int
    chunk: int


class Dependency(NamedTuple):
    """Another call, of the same chunk (0) or of the chunk that far before (-1, …)."""

    call: int
    chunks: int


@dataclass(frozen=True)
class TaskGraph:
    """Tasks chunk behind chunk, which is an order that can run when one chunk is in flight.

    What task t waits for is `after_list[after_starts[t]:after_starts[t + 1]]`. `slots` are the buffers of one chunk;
    a lane has a copy of each, and `lanes` chunks may be in flight.
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
        return tuple(map(Task, self.call_of.tolist(), self.chunk_of.tolist()))

    @cached_property
    def after(self) -> tuple[tuple[int, ...], ...]:
        """What each task waits for."""
        starts, found = self.after_starts.tolist(), self.after_list.tolist()
        return tuple(tuple(found[a:b]) for a, b in pairwise(starts))

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The device of each call."""
        of = {segment.name: segment.device for segment in self.split.segments}
        return tuple(of[call.segment] for call in self.split.calls)

    @cached_property
    def every_device(self) -> tuple[str, ...]:
        """The devices, in order of first use."""
        return tuple(dict.fromkeys(self.devices))

    @cached_property
    def native(self) -> _scheduling.Tasks:
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


def needed(split: Split, want: Want) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The calls that every chunk but the last needs, and those that the last one needs.

    "last" asks for the outputs of the last chunk, "all" for those of every chunk; a later turn reads the cache of
    every token, so what writes it is always needed.
    """
    kinds = {value.name: value.kind for value in split.values}
    cached = [i for i, call in enumerate(split.calls) if any(kinds[name] == "cache" for name in call.writes)]
    giving = [i for i, call in enumerate(split.calls) if any(kinds[name] == "output" for name in call.writes)]
    last = _with_ancestors(split, [*cached, *giving])
    return (last if want == "all" else _with_ancestors(split, cached)), last


def _with_ancestors(split: Split, calls: Sequence[int]) -> tuple[int, ...]:
    writer = split.writer()
    stack, found = list(calls), set()
    while stack:
        call = stack.pop()
        if call not in found:
            found.add(call)
            stack += [writer[name] for name in split.calls[call].reads if name in writer]
    return tuple(sorted(found))


def build(
    split: Split, chunks: tuple[Chunk, ...], want: Want, in_flight: int = 1, *, abreast: int = 1
) -> TaskGraph:
    """Build the task graph with buffers for `in_flight` chunks at once; chunk c follows c - in_flight.

    `abreast`: how many chunks may be in static segments at once; they are kept apart in scratch memory.
    """
    pattern = pattern_of(split, want)
    scratch = _scheduling.Scratch(scratch_groups.blocks(split), scratch_groups.num_groups(split))
    call_of, chunk_of, starts, found, lanes = _scheduling.repeat(
        pattern.native, scratch, chunks, in_flight, abreast
    )
    slots = assign(split)
    rows = max(chunk.compiled_size for chunk in chunks)
    values, writer = {value.name: value for value in split.values}, split.writer()
    outputs = tuple(
        values[name].row_bytes * (1 if want == "last" and split.calls[writer[name]].rows == "last" else rows)
        for name in slots.outputs
    )
    return TaskGraph(
        split,
        chunks,
        want,
        call_of,
        chunk_of,
        starts,
        found,
        slots,
        lanes,
        tuple(size * rows for size in slots.row_bytes),
        outputs * (len(chunks) if want == "all" else 1),
    )


Waits = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pattern:
    """What is the same for every prompt: the calls of a chunk and of the last chunk, and what waits for what.

    A row of `body_waits` and `last_waits` has the place of a call among the chunk's calls, the place of a call that it
    waits for, and how many chunks before that one is (LANE_BEFORE: the chunk whose buffers it takes over)."""

    body: Int32Array
    last: Int32Array
    body_waits: Waits
    last_waits: Waits

    @cached_property
    def native(self) -> _scheduling.Pattern:
        return _scheduling.Pattern(self.body, self.last, self.body_waits, self.last_waits)


@lru_cache(maxsize=64)
def pattern_of(split: Split, want: Want) -> Pattern:
    body, last = needed(split, want)
    slots = assign(split)
    place = [{call: place for place, call in enumerate(calls)} for calls in (body, last)]

    def waits(here: Sequence[int]) -> Waits:
        found = [
            (place[here is last][call], place[here is last and d.chunks == 0][d.call], d.chunks)
            for call, dependencies in _waits(split, slots, here, body).items()
            for d in dependencies
        ]
        return np.array(found, np.int64).reshape(-1, 3)

    return Pattern(np.array(body, np.int32), np.array(last, np.int32), waits(body), waits(last))


def _waits(
    split: Split, slots: Slots, here: Sequence[int], elsewhere: Sequence[int]
) -> dict[int, tuple[Dependency, ...]]:
    """What the calls of a chunk wait for; `elsewhere` are the calls of the chunks before it."""
    writer = split.writer()
    touching = users(split)
    present, earlier = set(here), set(elsewhere)
    cached = {value.name for value in split.values if value.kind == "cache"}
    waits: dict[int, set[Dependency]] = {call: set() for call in here}
    for call in here:
        # A call may read the cache it appends to: what the chunks before left in it.
        sources = {writer[name] for name in split.calls[call].reads if name in writer} - {call}
        waits[call] |= {Dependency(source, 0) for source in sources}
        # A layer's chunks are appended in order.
        if call in earlier and any(name in cached for name in split.calls[call].writes):
            waits[call].add(Dependency(call, -1))
    # One method is one instance (attention apart): its calls run one behind the other.
    for calls in _by_segment(split, here).values():
        if has_instance_per_worker(split, calls[0]):
            continue
        for one, other in pairwise(calls):
            waits[other].add(Dependency(one, 0))
        if before := [call for call in calls if call in earlier]:
            waits[calls[0]].add(Dependency(before[-1], -1))
    # A slot's next writer waits for everyone who used what it held.
    for held in slots.values:
        left = [name for name in held if any(call in earlier for call in touching[name])]
        users_before = (
            [Dependency(c, LANE_BEFORE) for c in touching[left[-1]] if c in earlier] if left else []
        )
        for name in held:
            if writer[name] not in present:
                continue
            waits[writer[name]] |= set(users_before)
            users_before = [Dependency(call, 0) for call in touching[name] if call in present]
    return {call: _direct(call, found, waits if elsewhere == here else None) for call, found in waits.items()}


def _by_segment(split: Split, calls: Iterable[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for call in calls:
        found.setdefault(split.calls[call].segment, []).append(call)
    return found


def _direct(
    call: int, waits: set[Dependency], of: Mapping[int, set[Dependency]] | None
) -> tuple[Dependency, ...]:
    """Drop dependencies that a direct one implies (one step back is enough to keep lists short)."""
    waits = waits - {Dependency(call, 0)}
    if of is not None:
        implied = {
            Dependency(further.call, near.chunks + further.chunks)
            for near in waits
            if near.chunks == 0
            for further in of[near.call]
        }
        waits = waits - implied
    return tuple(sorted(waits))


def has_instance_per_worker(split: Split, call: int) -> bool:
    """Whether each worker has its own instance: dynamic segments without weights (attention)."""
    segment = split.segment(split.calls[call].segment)
    return isinstance(segment.shape, SizeRanges) and segment.weight_bytes == 0
