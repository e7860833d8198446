"""Measure a program on this machine: every method's time by rows, by cached tokens and by threads; hand-overs; how
much workers slow each other down. Nothing else should run meanwhile.

Methods run in their turn, as in a prefill, so that each finds the caches as its neighbours left them.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from doubleweave.choice import chunk_shape, default_choice
from doubleweave.contention import Ran, fit
from doubleweave.errors import InputError
from doubleweave.find_profile import GENERIC, program_id, this_machine
from doubleweave.ir import Static, most_rows
from doubleweave.profile import Measured, Profile, uses_cache
from doubleweave.program import Program
from doubleweave.session import Recorded, Session, TokenIds
from doubleweave.threads import threads_or_all
from doubleweave.waits import waits_of

Progress = Callable[[str, int, int], None]

_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_CACHED = (0, 256, 1024, 2048, 4096)
_RUNS_TOGETHER = 3
_PROMPT = 1024


def measure(
    program: Program,
    *,
    runs: int = 5,
    max_cached: int = _CACHED[-1],
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Profile:
    """Measure with `runs` runs each, caches of up to `max_cached` tokens, methods on one thread and on `threads` (by
    default the machine's cores), workers by twos, fours, … up to all. The profile has no decisions yet (`planner.py`).

    Raises InputError for numbers that make no sense.
    """
    if runs < 1 or max_cached < 0:
        raise InputError(
            f"profile: found {runs} runs and {max_cached} cached tokens, expected at least 1 run and 0 tokens"
        )
    threads = threads_or_all(threads)
    counts, workers = sorted({1, threads}), worker_counts(threads)
    shape = chunk_shape(program.split)
    sizes = shape.sizes if isinstance(shape, Static) else _rows(most_rows(shape))
    limit = min(max_cached, program.model.max_context - max(sizes))
    depths = sorted({min(cached, limit) for cached in _CACHED}, reverse=True)
    total = len(counts) * len(sizes) * len(depths) + len(workers)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    ids = np.random.default_rng(0).integers(0, program.model.vocab_size, limit + max(sizes))
    samples: dict[int, dict[tuple[str, int], dict[int, list[float]]]] = {}
    for count in counts:
        session = _filled(program, ids[:limit], threads)
        session.use(default_choice(program.split, "sequential", count))
        found: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for cached in depths:
            for rows in sizes:
                step(f"{count} threads, {rows} rows, {cached} cached")
                _sample(session, ids, rows, cached, runs, found)
        samples[count] = found
    profile = Profile(
        name=f"{program.manifest.name} on {this_machine()}",
        kind="measured",
        machine=this_machine(),
        program=program_id(program.split),
        segments=_fitted(program, samples),
    )
    for count in workers:
        step(f"{count} workers")
        profile = _with_workers(program, profile, ids, count, threads)
    progress("done", total, total)
    return profile


def worker_counts(most: int) -> tuple[int, ...]:
    """2, 4, … and `most`; none where that is 1."""
    return tuple(sorted({*(2**i for i in range(1, most.bit_length()) if 2**i <= most), most} - {1}))


def _rows(most: int) -> tuple[int, ...]:
    return tuple(sorted({most, *(rows for rows in _ROWS if rows < most)}))


def _filled(program: Program, ids: TokenIds, threads: int) -> Session:
    """A session with its cache filled in the quickest way."""
    session = program.session("wavefront", threads, profile=GENERIC)
    if len(ids):
        session.append(ids)
    return session


def _sample(
    session: Session,
    ids: TokenIds,
    rows: int,
    cached: int,
    runs: int,
    found: dict[tuple[str, int], dict[int, list[float]]],
) -> None:
    """Run one chunk behind `cached` tokens several times and note each call's microseconds."""
    for number in range(runs + 1):
        session.truncate(cached)
        session.append(ids[cached : cached + rows], record=True)
        recorded = session.recorded
        assert recorded is not None
        if number == 0:
            continue  # loads methods, touches memory
        graph = recorded.verified.graph
        took = (recorded.end_ns - recorded.start_ns) / 1e3
        for task, us in enumerate(took.tolist()):
            call = graph.split.calls[graph.call_of[task]]
            computed = 1 if call.rows == "last" else rows
            found[call.segment, computed][cached].append(us)


def _fitted(
    program: Program, samples: Mapping[int, Mapping[tuple[str, int], Mapping[int, Sequence[float]]]]
) -> dict[str, dict[int, Measured]]:
    result: dict[str, dict[int, Measured]] = defaultdict(dict)
    for threads, found in samples.items():
        for segment in program.split.segments:
            points = {
                rows: by_cached for (name, rows), by_cached in sorted(found.items()) if name == segment.name
            }
            if points:
                result[segment.name][threads] = _table(points, uses_cache(segment))
    return dict(result)


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


def _with_workers(program: Program, profile: Profile, ids: TokenIds, count: int, threads: int) -> Profile:
    """Add what workers cost each other, from runs of several schedules on `count` workers."""
    devices = {segment.device for segment in program.split.segments}
    schedules = ["wavefront", *(["out_of_order"] if 1 < len(devices) <= count else [])]
    runs: list[Ran] = []
    hand_overs: dict[tuple[str, str], list[int]] = defaultdict(list)
    same_worker: list[int] = []
    prompt = ids[: min(_PROMPT, len(ids))]
    for name in schedules:
        session = program.session(name, threads, profile=GENERIC)
        session.use(default_choice(program.split, name, count))
        for number in range(_RUNS_TOGETHER + 1):
            session.reset()
            session.append(prompt, record=True)
            recorded = session.recorded
            assert recorded is not None
            if number == 0:
                continue
            runs.append(_ran(profile, recorded))
            waits = waits_of(recorded.verified, recorded.start_ns, recorded.end_ns)
            same_worker += waits.same_worker
            for pair, values in waits.hand_overs.items():
                hand_overs[pair] += values
    known = profile.contention
    fitted = fit(runs)
    return replace(
        profile,
        contention={pair: round(max(value, known.get(pair, 0.0)), 4) for pair, value in fitted.items()},
        hand_over_us={
            pair: round(statistics.median(values) / 1e3, 3) for pair, values in sorted(hand_overs.items())
        },
        same_worker_us=round(statistics.median(same_worker) / 1e3, 3),
    )


def _ran(profile: Profile, recorded: Recorded) -> Ran:
    graph = recorded.verified.graph
    workers = np.zeros(len(graph), np.int64)
    for worker, tasks in enumerate(recorded.verified.workers):
        workers[list(tasks)] = worker
    costs = profile.costs(graph, recorded.choice.threads, cached=recorded.cached)
    devices = [graph.devices[call] for call in graph.call_of.tolist()]
    return Ran(devices, workers, recorded.start_ns, recorded.end_ns, costs.duration_ns)
