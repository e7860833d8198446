"""Simulate a schedule: a discrete-event run on costs. No torch, no ExecuTorch."""

from __future__ import annotations

from doubleweave import _scheduling
from doubleweave.schedule.costs import Costs, Int64Array
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import TaskGraph


def times(graph: TaskGraph, schedule: Schedule, costs: Costs) -> tuple[Int64Array, Int64Array]:
    """The start and end of each task in nanoseconds, int64 [n]; raises ScheduleError for tasks that would wait for
    ever."""
    return _scheduling.times(schedule.devices, schedule.workers, graph.native, costs.native(graph))
