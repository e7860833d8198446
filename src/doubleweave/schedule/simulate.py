"""When the tasks of a schedule would run: a discrete-event run on costs. No torch, no ExecuTorch."""

from __future__ import annotations

import numpy as np

from doubleweave import _scheduling
from doubleweave.errors import ScheduleError
from doubleweave.schedule.costs import Costs, Int64Array
from doubleweave.schedule.schedule import Schedule, without_barriers
from doubleweave.schedule.task_graph import TaskGraph


def times(graph: TaskGraph, schedule: Schedule, costs: Costs) -> tuple[Int64Array, Int64Array]:
    """When each task would start and end, in nanoseconds; raises ScheduleError where it would wait for ever."""
    lists, starts, after = without_barriers(schedule, graph)
    kinds = sorted(set(graph.devices))
    kind = np.array([kinds.index(device) for device in graph.devices], np.int32)[graph.call_of]
    try:
        return _scheduling.simulate(
            costs.durations_ns(graph, lists),
            starts,
            after,
            lists,
            costs.hand_overs(schedule.devices),
            kind,
            costs.contentions(kinds),
        )
    except ValueError as error:
        raise ScheduleError(f"schedule: {error}") from error
