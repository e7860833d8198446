"""The pattern of a run: a chunk's calls and the calls that each of them waits for.

All chunks but the last are alike, and prompts differ only in how many chunks they have. So a pattern is worked out
once, at compile time, and the native module repeats it for every chunk of a prompt. Calls whose results nobody reads
are not in it. A slot's reuse is a dependency, so the pattern depends on the slots. This file knows nothing of the
prompt's length, of workers, threads or torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from doubleweave import _scheduling
from doubleweave.ir.split import SizeRanges, Split
from doubleweave.schedule.buffer_slots import Slots, assign, users

Want = Literal["last", "all"]
Int32Array = npt.NDArray[np.int32]
# Stands for the chunk whose buffers a chunk takes over: as many chunks before as there are lanes. With a symbol in the
# place of the number, run.json needs no pattern for each number of lanes (doubleweave/scheduling/task_graph.h).
LANE_BEFORE = 1


class Dependency(NamedTuple):
    """A call to wait for: of the same chunk (`chunks` is 0), of an earlier chunk (-1, …), or of LANE_BEFORE's."""

    call: int
    chunks: int


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Pattern:
    """`body` are the calls of every chunk but the last, `last` those of the last one.

    Waits are int64 [n, 3]. A row has the place of a call among its chunk's calls, the place of a call that it waits for
    among the calls of that other call's chunk, and that chunk (as `Dependency.chunks`).
    """

    body: Int32Array
    last: Int32Array
    body_waits: npt.NDArray[np.int64]
    last_waits: npt.NDArray[np.int64]

    @cached_property
    def native(self) -> _scheduling.Pattern:
        return _scheduling.Pattern(self.body, self.last, self.body_waits, self.last_waits)


@lru_cache(maxsize=64)  # a session plans at every prompt, and a pattern depends on the split alone
def pattern_of(split: Split, want: Want) -> Pattern:
    """The pattern of the calls that `want` needs."""
    body, last = needed(split, want)
    # One set of slots for every chunk, of all calls: the last chunk, which runs more of them, needs no other lane.
    slots = assign(split)
    body_waits = _without_implied(_waits(split, slots, body, body))
    # A last chunk with more calls is not repeated, so its lists need not be short.
    last_waits = body_waits if last == body else _waits(split, slots, last, body)
    return Pattern(
        np.array(body, np.int32),
        np.array(last, np.int32),
        _rows(body_waits, body, body),
        _rows(last_waits, last, body),
    )


def needed(split: Split, want: Want) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The calls that every chunk but the last needs, and the calls that the last chunk needs.

    "last" asks for the outputs of the last chunk, "all" for those of every chunk. Calls that append to the cache are
    always needed, because later tokens read the rows of every token. Generating text drops lm_head, and the last
    layer's attention and MLP, for all chunks but the last.
    """
    writer = split.writer()
    giving = [writer[value.name] for value in split.values if value.kind == "output"]
    last = _with_ancestors(split, split.appending + giving)
    return (last if want == "all" else _with_ancestors(split, split.appending)), last


def _with_ancestors(split: Split, calls: Sequence[int]) -> tuple[int, ...]:
    writer = split.writer()
    stack, found = list(calls), set()
    while stack:
        call = stack.pop()
        if call not in found:
            found.add(call)
            stack += [writer[name] for name in split.calls[call].reads if name in writer]
    return tuple(sorted(found))


def has_instance_per_worker(split: Split, call: int) -> bool:
    """Whether each worker has an instance of its own: dynamic segments without weights, such as attention.

    Such an instance takes little memory, and layers share the segment: with one instance their attentions would run one
    at a time, which would serialise the chunks in flight.
    """
    segment = split.segment(split.calls[call].segment)
    return isinstance(segment.shape, SizeRanges) and segment.weight_bytes == 0


def _waits(
    split: Split, slots: Slots, here: Sequence[int], earlier: Sequence[int]
) -> dict[int, set[Dependency]]:
    """The dependencies of each call of a chunk; `here` are the chunk's calls, `earlier` those of a chunk before it."""
    waits: dict[int, set[Dependency]] = {call: set() for call in here}
    for call, dependency in chain(
        _data_waits(split, here, earlier),
        _instance_waits(split, here, earlier),
        _slot_waits(split, slots, here, earlier),
    ):
        waits[call].add(dependency)
    return waits


def _data_waits(
    split: Split, here: Sequence[int], earlier: Sequence[int]
) -> Iterator[tuple[int, Dependency]]:
    writer, appending, ringed = split.writer(), split.appending, _ring_readers(split)
    for call in here:
        for name in split.calls[call].reads:
            # A call may read the cache it appends to: the rows of the chunks before.
            if writer.get(name, call) != call:
                yield call, Dependency(writer[name], 0)
        # A layer's chunks are appended in order: a reader that waits for a chunk's rows then has all rows before them.
        if call in earlier and call in appending:
            yield call, Dependency(call, -1)
            # Rows of a cache with a window take the places of those that the chunk before could see.
            for reader in ringed.get(call, ()):
                if reader in earlier:
                    yield call, Dependency(reader, -1)


def _ring_readers(split: Split) -> dict[int, list[int]]:
    """The calls that read what a call appends to caches with a window, by that call."""
    writer = split.writer()
    ringed = {value.name for value in split.values if value.window}
    found: dict[int, list[int]] = {}
    for number, call in enumerate(split.calls):
        for name in ringed.intersection(call.reads):
            found.setdefault(writer[name], []).append(number)
    return found


def _instance_waits(
    split: Split, here: Sequence[int], earlier: Sequence[int]
) -> Iterator[tuple[int, Dependency]]:
    # A segment has one instance, whose inputs, outputs and planned memory serve one run at a time: its calls run one
    # behind the other, the first of a chunk behind the last of the chunk before.
    of_segment: dict[str, list[int]] = {}
    for call in here:
        if not has_instance_per_worker(split, call):
            of_segment.setdefault(split.calls[call].segment, []).append(call)
    for calls in of_segment.values():
        for one, other in pairwise(calls):
            yield other, Dependency(one, 0)
        if before := [call for call in calls if call in earlier]:
            yield calls[0], Dependency(before[-1], -1)


def _slot_waits(
    split: Split, slots: Slots, here: Sequence[int], earlier: Sequence[int]
) -> Iterator[tuple[int, Dependency]]:
    # A slot's next writer waits for all calls that touched the value it held: a late reader would read the new value,
    # and a late writer would overwrite it (a value may have no reader).
    writer, touching = split.writer(), users(split)
    for held in slots.values:
        # The first writer of a chunk waits for the value that the lane's chunk before left in the slot.
        left = [name for name in held if any(call in earlier for call in touching[name])]
        before = (
            [Dependency(call, LANE_BEFORE) for call in touching[left[-1]] if call in earlier] if left else []
        )
        for name in held:
            if writer[name] not in here:
                continue
            for dependency in before:
                yield writer[name], dependency
            before = [Dependency(call, 0) for call in touching[name] if call in here]


def _without_implied(waits: Mapping[int, set[Dependency]]) -> dict[int, set[Dependency]]:
    """Drop dependencies that follow from another dependency within the chunk.

    The lists are repeated for every chunk of every prompt, so short lists save time. One step back makes them short
    enough; a dependency too many changes nothing.
    """
    return {
        call: found.difference(*(waits[near.call] for near in found if near.chunks == 0))
        for call, found in waits.items()
    }


def _rows(
    waits: Mapping[int, set[Dependency]], here: Sequence[int], earlier: Sequence[int]
) -> npt.NDArray[np.int64]:
    place_here = {call: place for place, call in enumerate(here)}
    place_earlier = {call: place for place, call in enumerate(earlier)}
    rows = [
        (place_here[call], place_here[other] if chunks == 0 else place_earlier[other], chunks)
        for call, found in waits.items()
        for other, chunks in sorted(found)
    ]
    return np.array(rows, np.int64).reshape(-1, 3)
