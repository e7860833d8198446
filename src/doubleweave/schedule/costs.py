"""What the tasks of one graph cost on one machine: what makers weigh and the simulator runs on.

It knows nothing of where costs come from (`profile.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from doubleweave import _scheduling
from doubleweave.schedule.task_graph import TaskGraph, build

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_ANY = "any"
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Costs:
    """`duration_ns[t]` is the time of task t run alone.

    `hand_over_ns[a, b]`: from the end of a task on device a to the start of one on another worker, of device b, that
    reads its result; `same_worker_ns`: between two tasks of one worker. `repeated[t]`: the share of its time that task
    t takes where its worker has just run the same call (None: all of it). `contention[a, b]`: how much longer a task
    on device a takes while another worker, of device b, runs one (0.1 is 10% longer). What is not listed is 0.
    """

    duration_ns: Int64Array
    hand_over_ns: Mapping[tuple[str, str], int] = field(default_factory=dict)
    same_worker_ns: int = 0
    contention: Mapping[tuple[str, str], float] = field(default_factory=dict)
    repeated: FloatArray | None = None

    def durations_ns(self, graph: TaskGraph, lists: Sequence[Sequence[int]]) -> Int64Array:
        """Each task's time in a schedule with these lists: shorter where it follows a task of the same call, whose keys
        and values are still in the processor's cache."""
        if self.repeated is None:
            return self.duration_ns
        follows = np.zeros(len(graph), bool)
        for tasks in lists:
            at = np.array(tasks, np.int64)
            follows[at[1:]] = graph.call_of[at[1:]] == graph.call_of[at[:-1]]
        return np.rint(np.where(follows, self.repeated, 1.0) * self.duration_ns).astype(np.int64)

    def hand_overs(self, workers: Sequence[str]) -> Int64Array:
        """Nanoseconds from worker to worker, row by row."""
        return np.array(
            [
                self.same_worker_ns if i == j else _of(self.hand_over_ns, a, b, 0)
                for i, a in enumerate(workers)
                for j, b in enumerate(workers)
            ],
            np.int64,
        )

    def contentions(self, devices: Sequence[str]) -> npt.NDArray[np.float64]:
        """How much longer a task of a device takes while one of another (or the same) device runs, row by row."""
        return np.array([self.contention.get((a, b), 0.0) for a in devices for b in devices], np.float64)


def _of(table: Mapping[tuple[str, str], Number], a: str, b: str, default: Number) -> Number:
    """The entry for two devices; a worker of any device takes the largest that could apply."""
    found = [value for (x, y), value in table.items() if a in (x, _ANY) and b in (y, _ANY)]
    return max(found, default=default)


def lower_bound_ns(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> tuple[int, str]:
    """What no schedule on these workers can be shorter than, and why: the longest path of what tasks read, or a
    device's work over its workers. Hand-overs, contention and reuse of buffers are not in it."""
    data = build(graph.split, graph.chunks, graph.want, len(graph.chunks))
    path = _scheduling.path_to_end(costs.duration_ns, data.after_starts, data.after_list)
    bounds = [(int(path.max(initial=0)), "critical path")]
    devices = np.array(graph.devices)[graph.call_of]
    anywhere = sum(worker == _ANY for worker in workers)
    for device in sorted(set(graph.devices)):
        count = anywhere + sum(worker == device for worker in workers)
        if count:
            bounds.append((int(costs.duration_ns[devices == device].sum()) // count, f"work of {device}"))
    bounds.append((int(costs.duration_ns.sum()) // len(workers), "work of all workers"))
    return max(bounds)
