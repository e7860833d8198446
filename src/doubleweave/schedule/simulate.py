"""When the tasks of a schedule would run: a discrete-event run on costs. No torch, no ExecuTorch."""

from __future__ import annotations

from doubleweave import _scheduling
from doubleweave.schedule.costs import Costs, Int64Array
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import TaskGraph


def times(graph: TaskGraph, schedule: Schedule, costs: Costs) -> tuple[Int64Array, Int64Array]:
    """When each task would start and end, in nanoseconds; raises ScheduleError where it would wait for ever."""
    return _scheduling.times(schedule.devices, schedule.workers, graph.native, costs.native(graph))
