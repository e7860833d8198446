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

from doubleweave.ir.split import SizeRanges, Split
from doubleweave.schedule import scratch_groups
from doubleweave.schedule.buffer_slots import Slots, assign, users
from doubleweave.schedule.chunks import Chunk

Want = Literal["last", "all"]
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
    count = len(chunks)
    lanes = min(in_flight, count)
    pattern = pattern_of(split, want, lanes)
    body, last = pattern.body, pattern.last
    call_of = np.concatenate([np.tile(body, count - 1), last])
    chunk_of = np.concatenate(
        [
            np.repeat(np.arange(count - 1, dtype=np.int32), len(body)),
            np.full(len(last), count - 1, np.int32),
        ]
    )
    # Chunk c begins at task c * len(body), the last chunk too.
    task, other, behind = pattern.body_waits
    chunk = np.arange(count - 1)[:, None]
    exists = chunk >= -behind
    tasks = [(chunk * len(body) + task)[exists]]
    before = [((chunk + behind) * len(body) + other)[exists]]
    task, other, behind = pattern.last_waits
    exists = count - 1 + behind >= 0
    tasks.append(((count - 1) * len(body) + task)[exists])
    before.append(((count - 1 + behind) * len(body) + other)[exists])

    def number(call: int, of_chunk: int) -> int:
        return of_chunk * len(body) + int((last if of_chunk == count - 1 else body).searchsorted(call))

    for (call, at), (earlier_call, there) in _keep_close(split, count, abreast):
        tasks.append(np.array([number(call, at)]))
        before.append(np.array([number(earlier_call, there)]))
    starts, found = _lists(len(call_of), tasks, before)
    slots = pattern.slots
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
        outputs * (count if want == "all" else 1),
    )


Waits = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Pattern(NamedTuple):
    """What is the same for every prompt: the calls of a chunk and of the last chunk, their slots, and what waits
    for what: places among the chunk's calls, places of what they wait for, and how many chunks before."""

    body: Int32Array
    last: Int32Array
    slots: Slots
    body_waits: Waits
    last_waits: Waits


@lru_cache(maxsize=64)
def pattern_of(split: Split, want: Want, lanes: int) -> Pattern:
    body, last = needed(split, want)
    slots = assign(split)
    place = [{call: place for place, call in enumerate(calls)} for calls in (body, last)]

    def waits(here: Sequence[int]) -> Waits:
        found = [
            (place[here is last][call], place[here is last and d.chunks == 0][d.call], d.chunks)
            for call, dependencies in _waits(split, slots, here, body, lanes).items()
            for d in dependencies
        ]
        columns = np.array(found, np.int64).reshape(-1, 3)
        return columns[:, 0], columns[:, 1], columns[:, 2]

    return Pattern(np.array(body, np.int32), np.array(last, np.int32), slots, waits(body), waits(last))


def _waits(
    split: Split, slots: Slots, here: Sequence[int], elsewhere: Sequence[int], lanes: int
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
        users_before = [Dependency(c, -lanes) for c in touching[left[-1]] if c in earlier] if left else []
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


def _lists(
    num_tasks: int, tasks: list[npt.NDArray[np.int64]], before: list[npt.NDArray[np.int64]]
) -> tuple[Int32Array, Int32Array]:
    """Pairs (task, what it waits for) as one list, task by task."""
    # One number a pair, so that one sort puts them in order.
    pairs = np.sort(np.concatenate(tasks) * num_tasks + np.concatenate(before), kind="stable")
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    starts = np.zeros(num_tasks + 1, np.int32)
    np.cumsum(np.bincount(pairs // num_tasks, minlength=num_tasks), out=starts[1:])
    return starts, (pairs % num_tasks).astype(np.int32)


def _keep_close(
    split: Split, num_chunks: int, abreast: int
) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    """Let no chunk run so far ahead of those abreast that two meet in one group of scratch memory.

    Gives (call, chunk) and what it waits for. Chunks run in rounds of `abreast`; within a round none is a whole
    number of groups ahead of the last, and a round starts no earlier than that behind the last chunk of the round
    before.
    """
    if abreast < 2:
        return
    order, span = scratch_groups.blocks(split), scratch_groups.num_groups(split) - 1
    if abreast > (span + 1) // 2:
        return
    for chunk in range(num_chunks):
        last = min((chunk // abreast + 1) * abreast, num_chunks) - 1
        for place, call in enumerate(order):
            behind = place - span
            if behind >= 0 and chunk != last:
                yield (call, chunk), (order[behind], last)
            elif behind < 0 and chunk >= abreast:
                yield (call, chunk), (order[behind], chunk // abreast * abreast - 1)


def has_instance_per_worker(split: Split, call: int) -> bool:
    """Whether each worker has its own instance: dynamic segments without weights (attention)."""
    segment = split.segment(split.calls[call].segment)
    return isinstance(segment.shape, SizeRanges) and segment.weight_bytes == 0
