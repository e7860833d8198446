"""The costs of one graph's tasks on one machine: makers weigh by them, and the simulator runs on them.

It knows nothing of where costs come from (predict/profile.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from doubleweave import _scheduling
from doubleweave.schedule.schedule import ANY
from doubleweave.schedule.task_graph import TaskGraph, build

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """`duration_ns[t]` is the time of task t run alone.

    `hand_over_ns[a, b]`: from the end of a task on device a to the start of one on another worker, of device b, that
    reads its result; `same_worker_ns`: between two tasks of one worker. `repeated[t]`: the share of its time that task
    t takes where its worker has just run the same call (None: all of it). `contention[a, b]`: how much longer a task
    on device a takes while another worker, of device b, runs one (0.1 is 10% longer). Pairs that are not listed have 0.
    """

    duration_ns: Int64Array
    hand_over_ns: Mapping[tuple[str, str], int] = field(default_factory=dict)
    same_worker_ns: int = 0
    contention: Mapping[tuple[str, str], float] = field(default_factory=dict)
    repeated: FloatArray | None = None

    def native(self, graph: TaskGraph) -> _scheduling.Costs:
        """The costs for the native module, with pairs in the order of the graph's devices."""
        pairs = [(a, b) for a in graph.every_device for b in graph.every_device]
        return _scheduling.Costs(
            np.asarray(self.duration_ns, np.int64),
            self.repeated,
            np.array([self.hand_over_ns.get(pair, 0) for pair in pairs], np.int64),
            self.same_worker_ns,
            np.array([self.contention.get(pair, 0.0) for pair in pairs], np.float64),
        )


def lower_bound_ns(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> tuple[int, str]:
    """A bound that no schedule on these workers beats, in nanoseconds, and the reason for it.

    The bound is the largest of the longest path over what tasks read from each other, each device's work over its
    workers, and all work over all workers. Hand-overs, contention and reuse of buffers are not in it: with them, a bad
    schedule over few buffers would look efficient.
    """
    # As many lanes as chunks: no buffer is reused, so the dependencies are those of data.
    data = build(graph.split, graph.chunks, graph.want, len(graph.chunks))
    path = _scheduling.path_to_end(costs.duration_ns, data.after_starts, data.after_list)
    bounds = [(int(path.max(initial=0)), "critical path")]
    devices = np.array(graph.devices)[graph.call_of]
    for device in sorted(set(graph.devices)):
        if count := sum(worker in (device, ANY) for worker in workers):
            bounds.append((int(costs.duration_ns[devices == device].sum()) // count, f"work of {device}"))
    bounds.append((int(costs.duration_ns.sum()) // len(workers), "work of all workers"))
    return max(bounds)
