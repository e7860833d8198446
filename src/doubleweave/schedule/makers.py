"""The makers of schedules: each builds a schedule from a task graph, workers and costs.

`workers` are the devices of the workers, such as ("npu", "cpu", "cpu"). Every maker's schedule keeps the order of
the graph's dependencies; costs tell which is fastest. The makers of these names are native
(native/scheduling/makers.cpp describes them); a user's own maker is a Python function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from doubleweave import _scheduling
from doubleweave.errors import InputError
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import TaskGraph

Maker = Callable[[TaskGraph, Sequence[str], Costs], Schedule]
MAKERS = tuple(_scheduling.schedules())


def make(name: str, graph: TaskGraph, workers: Sequence[str], costs: Costs, threads: int = 1) -> Schedule:
    """Make the schedule of that name; `threads` is the number of threads of each worker.

    Raises InputError for a name that does not exist, ScheduleError where a device of the graph has no worker.
    """
    if name not in MAKERS:
        raise InputError(f"schedule: found {name!r}, expected one of {', '.join(MAKERS)}")
    devices, lists = _scheduling.make_schedule(name, graph.native, workers, costs.native(graph))
    return Schedule(name, tuple(devices), tuple(map(tuple, lists)), threads)
