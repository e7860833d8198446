"""Measure contention, how much tasks on different workers of this machine slow each other down, and hand-overs.

Runs the same prompt alone and on several workers; contention_fit.py makes numbers of the difference.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from doubleweave.measure.contention_fit import Ran, fit
from doubleweave.measure.waits import waits_of
from doubleweave.predict.find_profile import GENERIC
from doubleweave.predict.profile import Profile
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Recorded, TokenIds
from doubleweave.schedule.choice import default_choice
from doubleweave.schedule.schedule import ANY

# Contention is fitted to the faster half of so many runs of a prompt of so many tokens.
_RUNS_TOGETHER = 7
_PROMPT = 1024


def with_contention(program: Program, profile: Profile, ids: TokenIds, count: int, threads: int) -> Profile:
    """Add contention and hand-overs, from runs of several schedules on `count` workers.

    Each round also runs the tasks alone: compared with times of another minute, a drift of the machine's speed would
    pass for contention.
    """
    devices = {segment.device for segment in program.split.segments}
    schedules = ["wavefront", *(["out_of_order"] if 1 < len(devices) <= count else [])]
    runs: list[Ran] = []
    hand_overs: dict[tuple[str, str], list[int]] = defaultdict(list)
    same_worker: list[int] = []
    session = program.session("sequential", threads, profile=GENERIC)
    for name in schedules:
        choice = default_choice(program.split, name, count)
        alone: list[Recorded] = []
        together: list[Recorded] = []
        for number in range(_RUNS_TOGETHER + 1):
            for kept, how in (
                (alone, choice._replace(schedule="sequential", workers=(ANY,), in_flight=1)),
                (together, choice),
            ):
                session.use(how)
                session.reset()
                recorded = session.append_recorded(ids[:_PROMPT])
                if number:
                    kept.append(recorded)
        alone, together = _faster_half(alone), _faster_half(together)
        runs += _ran(alone, together)
        for recorded in together:
            waits = waits_of(recorded.verified, recorded.start_ns, recorded.end_ns)
            same_worker += waits.same_worker
            for pair, values in waits.hand_overs.items():
                hand_overs[pair] += values
    found = {pair: round(value, 4) for pair, value in fit(runs).items()}
    return replace(
        profile,
        contention={**profile.contention, count: found},
        hand_over_us={
            pair: round(statistics.median(values) / 1e3, 3) for pair, values in sorted(hand_overs.items())
        },
        same_worker_us=round(statistics.median(same_worker) / 1e3, 3),
    )


def _faster_half(runs: Sequence[Recorded]) -> list[Recorded]:
    """The machine's other work only adds time, to some runs much."""
    return sorted(runs, key=lambda run: run.makespan_s)[: (len(runs) + 1) // 2]


def _ran(alone: Sequence[Recorded], together: Sequence[Recorded]) -> list[Ran]:
    """The runs in `together`, with the median times of their tasks in `alone`."""
    alone_ns = np.median([run.took_ns for run in alone], axis=0).astype(np.int64)
    graph = together[0].verified.graph
    assert graph.chunks == alone[0].verified.graph.chunks
    found = []
    for run in together:
        worker_of = run.verified.schedule.worker_of
        workers = np.array([worker_of[task] for task in range(len(graph))])
        found.append(Ran(graph.device_of, workers, run.start_ns, run.end_ns, alone_ns))
    return found
