"""Profiles: what segments cost on a machine, measured there or estimated from published figures.

A measured segment has its time by rows and by cached tokens; for anything else the time is estimated from operations
over peak and bytes over bandwidth of its device. It knows nothing of how profiles are
measured (`measure.py`) or stored (`profile_file.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from doubleweave.errors import InputError
from doubleweave.ir.split import CACHED, FixedSizes, Segment, Split
from doubleweave.predict.estimate import Device, estimate_us, weight_format
from doubleweave.schedule.choice import Choice, default_choice, overlapping_schedule
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.task_graph import TaskGraph

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A segment's time with some number of threads: `us[i][j]` microseconds (medians) at `rows[i]` rows behind
    `cached[j]` tokens; between and beyond them the model is linear in each.

    `repeated[j]` is the share of that time that a call of the most rows takes behind `cached[j]` tokens where its
    worker has just run the same call, for the chunk before; empty where it makes no difference.
    `spread[i]` is half the distance of the quartiles over the median; `misfit[i]` how far, at most, a median lies from
    the line between its neighbours, as a share of it: what leaving that point out would have cost.
    """

    rows: tuple[int, ...]
    cached: tuple[int, ...]
    us: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...] = ()
    misfit: tuple[float, ...] = ()
    repeated: tuple[float, ...] = ()

    def repeated_share(self, cached: FloatArray) -> FloatArray:
        """The share of its time that a call behind `cached` tokens takes after the same call, element by element."""
        if not self.repeated:
            return np.ones(len(cached))
        return np.interp(cached, self.cached, self.repeated)

    def time_us(self, rows: FloatArray, cached: FloatArray) -> FloatArray:
        """Microseconds for `rows` rows behind `cached` tokens, element by element."""
        table = np.array(self.us)
        i, share = _place(rows, self.rows)
        j, along = _place(cached, self.cached)
        next_i, next_j = np.minimum(i + 1, len(self.rows) - 1), np.minimum(j + 1, len(self.cached) - 1)
        here = table[i, j] + along * (table[i, next_j] - table[i, j])
        there = table[next_i, j] + along * (table[next_i, next_j] - table[next_i, j])
        result: FloatArray = np.maximum(here + share * (there - here), 0.0)
        return result


@dataclass(frozen=True)
class Decision:
    """What the planner chose for prompts of up to `tokens` tokens (and more than the decision before)."""

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

    def costs(
        self, graph: TaskGraph, threads: int = 1, workers: int = 1, *, all_rows: bool = False, cached: int = 0
    ) -> Costs:
        """What the tasks of a graph cost on so many workers, each method on `threads` threads, behind `cached` tokens.

        Raises InputError where the profile has neither a segment's time nor its device.
        """
        calls = graph.split.calls
        sizes = np.array([(c.num_tokens, c.compiled_size, cached + c.start) for c in graph.chunks], float)
        duration_us = np.zeros(len(graph))
        repeated = np.ones(len(graph))
        order = np.argsort(graph.call_of, kind="stable")
        bounds = np.searchsorted(graph.call_of[order], np.arange(len(calls) + 1))
        for index, call in enumerate(calls):
            tasks = order[bounds[index] : bounds[index + 1]]
            if not len(tasks):
                continue
            segment = graph.split.segment(call.segment)
            tokens, compiled, before = sizes[graph.chunk_of[tasks]].T
            rows = compiled if isinstance(segment.shape, FixedSizes) else tokens
            if call.rows == "last" and not all_rows:
                rows = np.ones(len(tasks))
            duration_us[tasks] = self.time_us(segment, rows, before, threads)
            if measured := self._measured(segment, threads):
                repeated[tasks] = measured.repeated_share(before)
        hand_over = {
            (a, b): self.hand_over_us_of(a, b) for a in self._devices(graph) for b in self._devices(graph)
        }
        return Costs(
            np.rint(duration_us * 1e3).astype(np.int64),
            {pair: round(us * 1e3) for pair, us in hand_over.items()},
            round(self.same_worker_us * 1e3),
            self.contention_of(workers),
            repeated,
        )

    def contention_of(self, workers: int) -> Mapping[tuple[str, str], float]:
        """Of that number of workers, or of the nearest one that the profile has."""
        nearest = min(self.contention, key=lambda count: (abs(count - workers), count), default=None)
        return {} if nearest is None else self.contention[nearest]

    def time_us(self, segment: Segment, rows: FloatArray, cached: FloatArray, threads: int) -> FloatArray:
        """A segment's time for `rows` rows behind `cached` tokens."""
        if measured := self._measured(segment, threads):
            return measured.time_us(rows, cached)
        if segment.device not in self.devices:
            raise InputError(
                f"profile {self.name}: found neither segment {segment.name!r} nor device {segment.device!r}, expected "
                f"one of them; measure this program with doubleweave profile, or add [device.{segment.device}]"
            )
        weights = weight_format(segment.recipe) if segment.recipe else self.weights
        return estimate_us(self.devices[segment.device], segment, weights, rows, cached + rows, threads)

    def _measured(self, segment: Segment, threads: int) -> Measured | None:
        """A segment's times with that many threads, or with the nearest number of them that the profile has."""
        found = self.segments.get(segment.name)
        return found[min(found, key=lambda count: (abs(count - threads), count))] if found else None

    def choose(self, split: Split, num_tokens: int, threads: int) -> Choice:
        """The planner's decision for a prompt of this length, or, where the profile has none for as many threads,
        the rule: a single chunk runs on every thread, several run as a wavefront (out of order with an NPU)."""
        if self.decisions and self.threads == threads:
            found = next((d for d in self.decisions if num_tokens <= d.tokens), self.decisions[-1])
            return found.choice
        wave = default_choice(split, overlapping_schedule(split), threads)
        return (
            wave
            if num_tokens > wave.chunk // 2 and threads > 1
            else default_choice(split, "sequential", threads)
        )

    def _devices(self, graph: TaskGraph) -> list[str]:
        return sorted(set(graph.devices))

    def hand_over_us_of(self, a: str, b: str) -> float:
        """From a worker of device a to another one of device b."""
        if (a, b) in self.hand_over_us:
            return self.hand_over_us[a, b]
        return self.devices[b].hand_over_us if b in self.devices else 0.0


def uses_cache(segment: Segment) -> bool:
    """Whether the segment reads rows of the cache."""
    return any(CACHED in port.shape for port in segment.inputs)


def _place(at: FloatArray, points: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """The interval of each number, the first or last one beyond the ends, and how far along it lies (0 to 1)."""
    x = np.array(points, float)
    if len(x) == 1:
        return np.zeros(len(at), np.int64), np.zeros(len(at))
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    return left, (at - x[left]) / (x[left + 1] - x[left])
