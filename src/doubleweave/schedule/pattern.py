"""The pattern of a run: the part of a task graph that is the same for every prompt; it is worked out at compile time.

A pattern has the calls of a chunk, the slots of their values and what each call waits for. Calls nobody needs are not
in it: `needed` walks back from what is asked for. Reusing a slot is a dependency, so slots are assigned here as well.
It knows nothing of the prompt's length, of workers, threads or torch.
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
# Stands for the chunk whose buffers a chunk takes over: as many before as there are lanes. So a pattern is the same for
# every number of lanes (doubleweave/scheduling/task_graph.h).
LANE_BEFORE = 1


class Dependency(NamedTuple):
    """Another call, of the same chunk (0), of the chunk that far before (-1, …), or of LANE_BEFORE."""

    call: int
    chunks: int


@dataclass(frozen=True, eq=False)
class Pattern:
    """`body` are the calls of every chunk but the last, `last` those of the last one.

    A row of waits, int64 [n, 3], has the place of a call among its chunk's calls, the place of the call it waits for
    among that call's chunk's, and how many chunks before (0, -1, …, LANE_BEFORE) that chunk is.
    """

    body: Int32Array
    last: Int32Array
    body_waits: npt.NDArray[np.int64]
    last_waits: npt.NDArray[np.int64]

    @cached_property
    def native(self) -> _scheduling.Pattern:
        return _scheduling.Pattern(self.body, self.last, self.body_waits, self.last_waits)


@lru_cache(maxsize=64)
def pattern_of(split: Split, want: Want) -> Pattern:
    """The pattern of the calls that `want` needs."""
    body, last = needed(split, want)
    slots = assign(split)
    body_waits = _without_implied(_waits(split, slots, body, body))
    # A last chunk with more calls is not repeated: its lists need not be short.
    last_waits = body_waits if last == body else _waits(split, slots, last, body)
    return Pattern(
        np.array(body, np.int32),
        np.array(last, np.int32),
        _rows(body_waits, body, body),
        _rows(last_waits, last, body),
    )


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


def has_instance_per_worker(split: Split, call: int) -> bool:
    """Whether each worker has its own instance: dynamic segments without weights (attention)."""
    segment = split.segment(split.calls[call].segment)
    return isinstance(segment.shape, SizeRanges) and segment.weight_bytes == 0


def _waits(
    split: Split, slots: Slots, here: Sequence[int], earlier: Sequence[int]
) -> dict[int, set[Dependency]]:
    """What each call of a chunk waits for; `here` are the chunk's calls, `earlier` those of the chunks before it."""
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
    writer = split.writer()
    cached = {value.name for value in split.values if value.kind == "cache"}
    for call in here:
        for name in split.calls[call].reads:
            # A call may read the cache it appends to: the rows of the chunks before.
            if writer.get(name, call) != call:
                yield call, Dependency(writer[name], 0)
        # A layer's chunks are appended in order: who waits for a chunk's rows then has all rows before them too.
        if call in earlier and any(name in cached for name in split.calls[call].writes):
            yield call, Dependency(call, -1)


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
    # A slot's next writer waits for all who used what it held: a reader that comes later would read the new value,
    # and a writer that comes later would overwrite it (a value may have no reader).
    writer, touching = split.writer(), users(split)
    for held in slots.values:
        # The chunk that had this lane before left in the slot what its last calls put there.
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
    """Drop dependencies that another call of the same chunk, which is waited for as well, already has.

    One step back is enough: it keeps the lists short, which are repeated for every chunk.
    """
    return {
        call: found
        - {
            Dependency(further.call, further.chunks)
            for near in found
            if near.chunks == 0
            for further in waits[near.call]
        }
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
