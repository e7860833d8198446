"""How long tasks waited although they could have run, read off a timeline's times: hand-overs and gaps.

It knows nothing of how schedules are made.
"""

from __future__ import annotations

from typing import NamedTuple

from doubleweave.schedule.costs import Int64Array
from doubleweave.schedule.task_graph import TaskGraph
from doubleweave.schedule.verify import Verified


class Waits(NamedTuple):
    """Nanoseconds, one for each task that was held up by nothing else: `hand_overs[a, b]` from the end of a task on
    device a to the start of one on another worker, of device b, that waited for it; `same_worker` from the end of a
    task to the start of the next one of its worker."""

    hand_overs: dict[tuple[str, str], list[int]]
    same_worker: list[int]


def waits_of(verified: Verified, start_ns: Int64Array, end_ns: Int64Array) -> Waits:
    """Find which task each one was held up by: the last to end of those that it waits for and its worker's last."""
    graph: TaskGraph = verified.graph
    starts, ends = start_ns.tolist(), end_ns.tolist()
    worker_of = {task: worker for worker, tasks in enumerate(verified.workers) for task in tasks}
    device_of = [graph.devices[call] for call in graph.call_of.tolist()]
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
