"""The makers of schedules: one function each, over (task graph, workers, costs).

`workers` are the devices of the workers, such as ("npu", "cpu", "cpu"). Every maker's schedule keeps the order of
the graph's dependencies; which of them is fastest, costs tell. It knows nothing of threads or ExecuTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from doubleweave import _scheduling
from doubleweave.errors import InputError, ScheduleError
from doubleweave.schedule.costs import Costs, Int64Array
from doubleweave.schedule.schedule import ANY, BARRIER, Schedule
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import Int32Array, TaskGraph

Maker = Callable[[TaskGraph, Sequence[str], Costs], Schedule]
Lists = tuple[tuple[int, ...], ...]
_NOWHERE = np.zeros(0, np.int32)  # tasks are at home nowhere


def sequential(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> Schedule:
    """One worker for every device, chunk behind chunk."""
    return Schedule("sequential", (ANY,), (tuple(range(len(graph))),))


def lockstep(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> Schedule:
    """Two chunks, one segment apart, and a barrier after each step: what mllm does (UbiquitousLearning/mllm).

    Even chunks follow each other in one row, odd ones in a second row that is a step behind.
    """
    rows: tuple[list[int], list[int]] = ([], [])
    for task, chunk in enumerate(graph.chunk_of.tolist()):
        rows[chunk % 2].append(task)
    able = [_able(device, workers) for device in graph.devices]
    lists: list[list[int]] = [[] for _ in workers]
    done: set[int] = set()
    place = [0, 0]
    while len(done) < len(graph):
        step: list[int] = []
        for row in (0, 1):
            # What waits for a task of this step (the other row's first chunk, say) stands still for a step.
            if place[row] < len(rows[row]) and done.issuperset(graph.after[rows[row][place[row]]]):
                task = rows[row][place[row]]
                of_device = able[graph.call_of[task]]
                lists[of_device[row % len(of_device)]].append(task)
                step.append(task)
                place[row] += 1
        assert step, "the earliest chunk's next task can always run"
        done.update(step)
        for tasks in lists:
            tasks.append(BARRIER)
    return Schedule("lockstep", tuple(workers), tuple(tuple(tasks[:-1]) for tasks in lists))


def pipelined(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> Schedule:
    """In order, as soon as inputs are ready: a free worker takes the earliest chunk's task that can run."""
    priority = -np.arange(len(graph), dtype=np.int64)
    return Schedule("pipelined", tuple(workers), _listed(graph, workers, costs, priority))


def out_of_order(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> Schedule:
    """The task with the longest way still to go comes first, whichever chunk it is of: tasks of later chunks may
    overtake (critical-path list scheduling; as llm.npu does, arXiv 2407.05858)."""
    return Schedule("out_of_order", tuple(workers), _by_urgency(graph, workers, costs))


def wavefront(graph: TaskGraph, workers: Sequence[str], costs: Costs) -> Schedule:
    """Each worker of a device takes chunks of its own, one layer or so behind the worker before.

    A chunk stays on one worker: its values stay in that core's cache, and workers meet only where a chunk needs the
    rows of earlier ones. But later chunks attend to more, so that somebody waits in every round; helping, a worker that
    would wait takes the most urgent task of another one's chunk. Of the ways to deal the chunks out the one with the
    shortest makespan is taken.
    """
    in_turn, there_and_back = (_homes(graph, workers, order) for order in (_in_turn, _there_and_back))
    dealt = [
        Schedule("wavefront", tuple(workers), lists)
        for lists in (
            _pinned(graph, workers, costs, in_turn),
            _pinned(graph, workers, costs, there_and_back),
            _by_urgency(graph, workers, costs, in_turn),
        )
    ]
    ends = [max(times(graph, schedule, costs)[1].tolist()) for schedule in dealt]
    return dealt[ends.index(min(ends))]


MAKERS: dict[str, Maker] = {
    "sequential": sequential,
    "lockstep": lockstep,
    "pipelined": pipelined,
    "out_of_order": out_of_order,
    "wavefront": wavefront,
}


def make(name: str, graph: TaskGraph, workers: Sequence[str], costs: Costs, threads: int = 1) -> Schedule:
    """Make the schedule of that name; `threads` is the number of threads of each worker.

    Raises InputError for a name that does not exist, ScheduleError where a device of the graph has no worker.
    """
    if name not in MAKERS:
        raise InputError(f"schedule: found {name!r}, expected one of {', '.join(MAKERS)}")
    for device in dict.fromkeys(graph.devices):
        _able(device, workers)
    made = MAKERS[name](graph, workers, costs)
    return Schedule(made.name, made.devices, made.workers, threads)


def _able(device: str, workers: Sequence[str]) -> list[int]:
    """The workers that can run a device's tasks: its own, or those of any device."""
    found = [w for w, of in enumerate(workers) if of == device] or [
        w for w, of in enumerate(workers) if of == ANY
    ]
    if not found:
        raise ScheduleError(
            f"workers: found {', '.join(workers) or 'none'}, but the program has segments for {device!r}; "
            f"add a worker for it, such as --workers {','.join([*workers, device])}"
        )
    return found


def _by_urgency(
    graph: TaskGraph, workers: Sequence[str], costs: Costs, homes: Int32Array = _NOWHERE
) -> Lists:
    """The task with the longest way still to go first."""
    priority = _scheduling.path_to_end(costs.duration_ns, graph.after_starts, graph.after_list)
    return _listed(graph, workers, costs, priority, homes)


def _listed(
    graph: TaskGraph,
    workers: Sequence[str],
    costs: Costs,
    priority: Int64Array,
    homes: Int32Array = _NOWHERE,
) -> Lists:
    names = sorted({*graph.devices, *workers} - {ANY})
    return _list_schedule(
        graph,
        np.array([names.index(device) for device in graph.devices], np.int32)[graph.call_of],
        [-1 if device == ANY else names.index(device) for device in workers],
        priority,
        homes,
        costs,
        workers,
    )


def _list_schedule(
    graph: TaskGraph,
    device: Int32Array,
    worker_device: Sequence[int],
    priority: Int64Array,
    homes: Int32Array,
    costs: Costs,
    workers: Sequence[str],
) -> Lists:
    lists = _scheduling.list_schedule(
        costs.duration_ns,
        graph.after_starts,
        graph.after_list,
        device,
        np.array(worker_device, np.int32),
        priority,
        homes,
        costs.hand_overs(workers),
    )
    return tuple(map(tuple, lists))


def _in_turn(chunk: int, count: int) -> int:
    return chunk % count


def _there_and_back(chunk: int, count: int) -> int:
    """0 1 2 2 1 0 0 1 2 …: later chunks attend to more, and nobody gets the longer one of each pair."""
    place = chunk % (2 * count)
    return min(place, 2 * count - 1 - place)


def _homes(graph: TaskGraph, workers: Sequence[str], order: Callable[[int, int], int]) -> Int32Array:
    """The worker of each task where each chunk has one of every device, `order(chunk, how many there are)`."""
    able = {device: _able(device, workers) for device in set(graph.devices)}
    of_call = [able[device] for device in graph.devices]
    return np.array(
        [
            of_call[call][order(chunk, len(of_call[call]))]
            for call, chunk in zip(graph.call_of.tolist(), graph.chunk_of.tolist(), strict=True)
        ],
        np.int32,
    )


def _pinned(graph: TaskGraph, workers: Sequence[str], costs: Costs, homes: Int32Array) -> Lists:
    """Every task at home, chunk behind chunk."""
    if len(set(graph.devices)) == 1 or len(set(homes.tolist())) == 1:
        return tuple(tuple(np.flatnonzero(homes == worker).tolist()) for worker in range(len(workers)))
    priority = -np.arange(len(graph), dtype=np.int64)
    return _list_schedule(graph, homes, list(range(len(workers))), priority, _NOWHERE, costs, workers)
