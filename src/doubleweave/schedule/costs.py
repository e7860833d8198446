"""What the tasks of one graph cost on one machine: what makers weigh and the simulator runs on.

It knows nothing of where costs come from (predict/profile.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from doubleweave import _scheduling
from doubleweave.schedule.task_graph import TaskGraph, build

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
_ANY = "any"


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

    def native(self, graph: TaskGraph) -> _scheduling.Costs:
        """The same over the devices of a graph."""
        pairs = [(a, b) for a in graph.every_device for b in graph.every_device]
        return _scheduling.Costs(
            np.asarray(self.duration_ns, np.int64),
            self.repeated,
            np.array([self.hand_over_ns.get(pair, 0) for pair in pairs], np.int64),
            self.same_worker_ns,
            np.array([self.contention.get(pair, 0.0) for pair in pairs], np.float64),
        )


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
