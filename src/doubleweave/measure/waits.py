"""Waits: hand-overs between workers and gaps on a worker, read off the times of a run.

It knows nothing of how schedules are made.
"""

from __future__ import annotations

from typing import NamedTuple

from doubleweave.schedule.costs import Int64Array
from doubleweave.schedule.verify import Verified


class Waits(NamedTuple):
    """Nanoseconds of waiting, each task under the task that held it up last.

    `hand_overs[a, b]` are from the end of a task on device a to the start of a task on another worker, of device b,
    that waits for it; `same_worker` from the end of a task to the start of its worker's next.
    """

    hand_overs: dict[tuple[str, str], list[int]]
    same_worker: list[int]


def waits_of(verified: Verified, start_ns: Int64Array, end_ns: Int64Array) -> Waits:
    """Take for each task the last to end of the tasks that it waits for and of its worker's task before it."""
    graph = verified.graph
    starts, ends = start_ns.tolist(), end_ns.tolist()
    worker_of, device_of = verified.schedule.worker_of, graph.device_of
    hand_overs: dict[tuple[str, str], list[int]] = {}
    same_worker: list[int] = []
    for tasks in verified.workers:
        for place, task in enumerate(tasks):
            others = [before for before in verified.after[task] if worker_of[before] != worker_of[task]]
            latest = max(others, key=ends.__getitem__, default=None)
            own = tasks[place - 1] if place else None
            if latest is not None and (own is None or ends[own] <= ends[latest]):
                pair = device_of[latest], device_of[task]
                hand_overs.setdefault(pair, []).append(starts[task] - ends[latest])
            elif own is not None:
                same_worker.append(starts[task] - ends[own])
    return Waits(hand_overs, same_worker)
