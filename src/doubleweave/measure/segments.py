"""Measure a program on this machine: every method's time by rows, by cached tokens and by threads; hand-overs; and
contention between workers. Nothing else should run on the machine meanwhile.

Methods run in their turn, as in a prefill, so that each finds the processor's caches as its neighbours leave them.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from doubleweave.errors import InputError
from doubleweave.ir.split import FixedSizes, most_rows
from doubleweave.measure.contention import with_contention
from doubleweave.predict.find_profile import GENERIC, program_id, this_machine
from doubleweave.predict.profile import Measured, Profile, uses_cache
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Session, TokenIds
from doubleweave.schedule.choice import chunk_shape, default_choice
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import TaskGraph

Progress = Callable[[str, int, int], None]
# By segment and rows, then by cached tokens: microseconds.
Samples = dict[tuple[str, int], dict[int, list[float]]]

_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_CACHED = (0, 256, 1024, 2048, 4096)


def measure(program: Program, *, runs: int, max_cached: int, threads: int, progress: Progress) -> Profile:
    """Measure with `runs` runs each, caches of up to `max_cached` tokens, methods on one thread and on `threads`, and
    2, 4, … `threads` workers. The profile has no decisions yet (decisions.py).

    `progress` gets a text, the steps done and the steps in all. Raises InputError for fewer than 1 run or 0 tokens.
    """
    if runs < 1 or max_cached < 0:
        raise InputError(
            f"profile: found {runs} runs and {max_cached} cached tokens, expected at least 1 run and 0 tokens"
        )
    counts, workers = sorted({1, threads}), worker_counts(threads)
    shape = chunk_shape(program.split)
    sizes = shape.sizes if isinstance(shape, FixedSizes) else _rows(most_rows(shape))
    # Behind the deepest cache two chunks of the most rows must fit: times of repeated calls take two.
    limit = max(0, min(max_cached, program.model.max_context - 2 * max(sizes)))
    # The deepest first: the cache is filled once a round, and cut for the others.
    depths = sorted({min(cached, limit) for cached in _CACHED}, reverse=True)
    total = (runs + 1) * len(counts) * len(depths) + len(workers)
    done = itertools.count()

    def step(what: str) -> None:
        progress(what, next(done), total)

    ids = np.random.default_rng(0).integers(0, program.model.vocab_size, limit + 2 * max(sizes))
    session = program.session("wavefront", threads, profile=GENERIC)
    samples, repeats = ({count: _no_samples() for count in counts} for _ in range(2))
    # A machine's speed drifts: rounds go over everything, so that each number is a median over all the time.
    for number in range(runs + 1):
        for count in counts:
            _fill(program, session, ids[:limit], threads)
            for cached in depths:
                step(f"{count} threads, {cached} cached, round {number}/{runs}")
                choice = default_choice(program.split, "sequential", count)
                session.use(choice)
                for rows in sizes:
                    _sample(session, ids, rows, cached, samples[count])
                session.use(choice._replace(schedule="pairwise", in_flight=2), _pairwise)
                _sample_repeats(session, ids, max(sizes), cached, repeats[count])
        if number == 0:  # the first round loads methods and touches memory
            samples, repeats = ({count: _no_samples() for count in counts} for _ in range(2))
    profile = Profile(
        name=f"{program.manifest.name} on {this_machine()}",
        kind="measured",
        machine=this_machine(),
        program=program_id(program.manifest.split),
        segments=_fitted(program, samples, repeats),
    )
    for count in workers:
        step(f"{count} workers")
        profile = with_contention(program, profile, ids, count, threads)
    progress("done", total, total)
    return profile


def _no_samples() -> Samples:
    return defaultdict(lambda: defaultdict(list))


def worker_counts(most: int) -> tuple[int, ...]:
    """2, 4, … and `most`; none where that is 1."""
    return tuple(sorted({*(2**i for i in range(1, most.bit_length()) if 2**i <= most), most} - {1}))


def _rows(most: int) -> tuple[int, ...]:
    return tuple(sorted({most, *(rows for rows in _ROWS if rows < most)}))


def _fill(program: Program, session: Session, ids: TokenIds, threads: int) -> None:
    """Fill the cache; a wavefront is the quickest way."""
    session.use(default_choice(program.split, "wavefront", threads))
    session.reset()
    if len(ids):
        session.append(ids)


def _sample(session: Session, ids: TokenIds, rows: int, cached: int, found: Samples) -> None:
    """Run one chunk behind `cached` tokens and note each call's microseconds."""
    session.move_to(cached)
    recorded = session.append_recorded(ids[cached : cached + rows])
    graph = recorded.verified.graph
    for task, us in enumerate((recorded.took_ns / 1e3).tolist()):
        call = graph.split.calls[graph.call_of[task]]
        computed = 1 if call.rows == "last" else rows
        found[call.segment, computed][cached].append(us)


def _sample_repeats(session: Session, ids: TokenIds, rows: int, cached: int, found: Samples) -> None:
    """Run two chunks behind `cached` tokens, each call for the first and then for the second, and note the second's
    microseconds."""
    session.move_to(cached)
    if cached + 2 * rows > session.max_context:
        return
    recorded = session.append_recorded(ids[cached : cached + 2 * rows])
    graph = recorded.verified.graph
    (tasks,) = recorded.verified.workers
    for before, task in itertools.pairwise(tasks):
        call = graph.split.calls[graph.call_of[task]]
        if graph.call_of[before] == graph.call_of[task] and call.rows == "all":
            found[call.segment, rows][cached].append(float(recorded.took_ns[task] / 1e3))


def _pairwise(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> Schedule:
    """On one worker, each call for every chunk before the next call."""
    order = np.lexsort((graph.chunk_of, graph.call_of)).tolist()
    return Schedule("pairwise", tuple(workers), (tuple(order),))


def _fitted(
    program: Program, samples: Mapping[int, Samples], repeats: Mapping[int, Samples]
) -> dict[str, dict[int, Measured]]:
    result: dict[str, dict[int, Measured]] = defaultdict(dict)
    for threads, found in samples.items():
        for segment in program.split.segments:
            points = {
                rows: by_cached for (name, rows), by_cached in sorted(found.items()) if name == segment.name
            }
            if points:
                measured = _table(points, uses_cache(segment))
                if uses_cache(segment):
                    repeated = repeats[threads].get((segment.name, measured.rows[-1]), {})
                    measured = replace(measured, repeated=_repeated(measured, repeated))
                result[segment.name][threads] = measured
    return dict(result)


def _repeated(measured: Measured, found: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
    """By cached tokens, the share of a call's time that it takes after the same call for the chunk before."""
    if not set(measured.cached) <= set(found):
        return ()
    rows = measured.rows[-1]
    # The second chunk has the rows of the first in its cache.
    usual = measured.time_us(
        np.full(len(measured.cached), float(rows)), np.array(measured.cached, float) + rows
    )
    took = [statistics.median(found[cached]) for cached in measured.cached]
    # Noise may slope the times down, so that they reach 0 where the line goes on behind the deepest cache.
    return tuple(round(us / at, 4) if us < at else 1.0 for us, at in zip(took, usual.tolist(), strict=True))


def _table(points: Mapping[int, Mapping[int, Sequence[float]]], uses_cache: bool) -> Measured:
    """Medians of times by rows and by cached tokens; where the cache is not read, of all of them."""
    cached = sorted(next(iter(points.values()))) if uses_cache else [0]
    us, spread, misfit = [], [], []
    for by_cached in points.values():
        every = [value for values in by_cached.values() for value in values]
        columns = [by_cached[at] for at in cached] if uses_cache else [every]
        us.append(tuple(round(statistics.median(values), 3) for values in columns))
        spread.append(round(statistics.median(_spread(values) for values in columns), 4))
        misfit.append(round(_misfit(cached, us[-1]), 4))
    return Measured(tuple(points), tuple(cached), tuple(us), tuple(spread), tuple(misfit))


def _misfit(at: Sequence[int], values: Sequence[float]) -> float:
    """How far, at most, an inner value lies from the line between its neighbours, over itself."""
    return max(
        (
            abs(np.interp(at[i], [at[i - 1], at[i + 1]], [values[i - 1], values[i + 1]]) / values[i] - 1)
            for i in range(1, len(at) - 1)
        ),
        default=0.0,
    )


def _spread(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2 / statistics.median(values)
