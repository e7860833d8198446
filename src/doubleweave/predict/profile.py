"""Profiles: the costs of segments on a machine, measured there or estimated from published figures.

A measured segment has its time by rows and by cached tokens; for anything else the time is estimated from operations
over peak and bytes over bandwidth of its device. It knows nothing of how profiles are
measured (measure/segments.py) or stored (`profile_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from doubleweave import _scheduling
from doubleweave.errors import InputError
from doubleweave.ir.split import CACHED, FixedSizes, Segment, Split
from doubleweave.predict.estimate import Device, Estimate, estimate, weight_format
from doubleweave.schedule.choice import Choice, devices_of
from doubleweave.schedule.costs import Costs, FloatArray
from doubleweave.schedule.task_graph import TaskGraph

MOST_THREADS = (
    1024  # of a machine that is described: each may become a worker, whose tasks are planned one by one
)


@dataclass(frozen=True)
class Measured:
    """A segment's time with some number of threads: `us[i][j]` microseconds (medians) at `rows[i]` rows behind
    `cached[j]` tokens; between and beyond them the model is linear in each.

    `repeated[j]` is the share of that time that a call of the most rows takes behind `cached[j]` tokens where its
    worker has just run the same call, for the chunk before: keys and values are then in the processor's cache. It is
    empty where it makes no difference.
    `spread[i]` is half the distance of the quartiles over the median; `misfit[i]` how far, at most, a median lies from
    the line between its neighbours, as a share of it: the model's error had that point been left out.
    """

    rows: tuple[int, ...]
    cached: tuple[int, ...]
    us: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...] = ()
    misfit: tuple[float, ...] = ()
    repeated: tuple[float, ...] = ()

    def time_us(self, rows: FloatArray, cached: FloatArray) -> FloatArray:
        """Microseconds for `rows` rows behind `cached` tokens, element by element."""
        return _scheduling.time_us(_scheduling.SegmentTimes([self.native(1)], None), rows, cached, 1)

    def native(self, threads: int) -> _scheduling.MeasuredTimes:
        return _scheduling.MeasuredTimes(threads, self.rows, self.cached, self.us, self.repeated)


@dataclass(frozen=True)
class Decision:
    """The choice for prompts of up to `tokens` tokens (and more than the decision before), and its makespan in seconds:
    measured, or simulated by `doubleweave profile --quick`."""

    tokens: int
    choice: Choice
    makespan_s: float


@dataclass(frozen=True)
class Profile:
    """`segments[name][threads]` are measured times; `hand_over_us` is by pairs of devices, as in `Costs`, and so is
    `contention[workers]`, for that many workers (the nearest number counts). `program` says what the segments are of
    (`program_id`), `machine` where they were measured. `decisions` are the planner's, in order of tokens, for `threads`
    threads in all. `weights` is the format of the program at hand (not in the file)."""

    name: str
    kind: str
    devices: Mapping[str, Device] = field(default_factory=dict)
    segments: Mapping[str, Mapping[int, Measured]] = field(default_factory=dict)
    hand_over_us: Mapping[tuple[str, str], float] = field(default_factory=dict)
    contention: Mapping[int, Mapping[tuple[str, str], float]] = field(default_factory=dict)
    same_worker_us: float = 0.0
    sources: tuple[str, ...] = ()
    machine: str = ""
    program: str = ""
    threads: int = 0
    decisions: tuple[Decision, ...] = ()
    weights: str = "int8"

    def tables(self, split: Split) -> _scheduling.CostTables:
        """The costs of a program's segments for the native module.

        Raises InputError where the profile has neither a segment's time nor its device.
        """
        devices = devices_of(split)
        return _scheduling.CostTables(
            list(map(self._times, split.segments)),
            self.hand_overs_ns(devices),
            round(self.same_worker_us * 1e3),
            list(self.contentions(devices).items()),
        )

    def _times(self, segment: Segment) -> _scheduling.SegmentTimes:
        measured = [table.native(threads) for threads, table in self.segments.get(segment.name, {}).items()]
        return _scheduling.SegmentTimes(measured, None if measured else self.estimate(segment).native())

    def estimate(self, segment: Segment) -> Estimate:
        """The times of a segment that was not measured; raises InputError without its device."""
        if segment.device not in self.devices:
            raise InputError(
                f"profile {self.name}: found neither segment {segment.name!r} nor device {segment.device!r}, expected "
                f"one of them; measure this program with doubleweave profile, or add [device.{segment.device}]"
            )
        # A segment whose scales are fixed at compile time names its recipe; the others have the program's.
        weights = weight_format(segment.recipe) if segment.recipe else self.weights
        return estimate(self.devices[segment.device], segment, weights)

    def hand_overs_ns(self, devices: Sequence[str]) -> list[list[int]]:
        """Nanoseconds from a worker of device i to another worker, of device j."""

        def us(a: str, b: str) -> float:
            published = self.devices[b].hand_over_us if b in self.devices else 0.0
            return self.hand_over_us.get((a, b), published)

        return [[round(us(a, b) * 1e3) for b in devices] for a in devices]

    def most_tasks(self, devices: Sequence[str]) -> list[int]:
        """How many tasks run at once on each device; 0 where the profile does not say."""
        return [(self.devices[name].workers or 0) if name in self.devices else 0 for name in devices]

    def contentions(self, devices: Sequence[str]) -> dict[int, list[list[float]]]:
        """By number of workers: the share by which a task of device i takes longer beside a task of device j.

        One set a number of workers: two cores of a processor may share a third unit, so that one figure a pair of
        devices is wrong for two workers or for four.
        """
        return {
            workers: [[pairs.get((a, b), 0.0) for b in devices] for a in devices]
            for workers, pairs in self.contention.items()
        }


def costs_of(
    tables: _scheduling.CostTables,
    graph: TaskGraph,
    threads: int,
    workers: int,
    *,
    all_rows: bool = False,
    cached: int = 0,
) -> Costs:
    """The costs of a graph's tasks, by a profile's tables of its program, on so many workers, each method on `threads`
    threads, behind `cached` tokens. `all_rows`: calls that compute the last row alone otherwise compute all rows."""
    split = graph.split
    duration_ns, repeated, hand_over_ns, same_worker_ns, contention = _scheduling.costs_of(
        tables,
        call_costs(split),
        graph.chunks,
        graph.call_of,
        graph.chunk_of,
        threads,
        workers,
        all_rows,
        cached,
    )
    pairs = [(a, b) for a in devices_of(split) for b in devices_of(split)]
    return Costs(
        duration_ns,
        dict(zip(pairs, hand_over_ns.tolist(), strict=True)),
        same_worker_ns,
        {pair: share for pair, share in zip(pairs, contention.tolist(), strict=True) if share},
        repeated,
    )


@lru_cache(maxsize=64)
def call_costs(split: Split) -> list[tuple[int, int, bool, bool]]:
    """The facts that each call's costs depend on: the places of its segment and device, whether it has fixed sizes, and
    whether it computes the last row alone. A segment that runs row by row takes no padding, as a dynamic one."""
    places = {segment.name: place for place, segment in enumerate(split.segments)}
    devices = devices_of(split)
    segments = [split.segment(call.segment) for call in split.calls]
    return [
        (
            places[s.name],
            devices.index(s.device),
            isinstance(s.shape, FixedSizes) and not s.each_row,
            call.rows == "last",
        )
        for s, call in zip(segments, split.calls, strict=True)
    ]


def uses_cache(segment: Segment) -> bool:
    """Whether the segment reads rows of the cache."""
    return any(CACHED in port.shape for port in segment.inputs)
