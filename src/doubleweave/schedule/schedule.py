"""Schedules: for each worker, the ordered list of its tasks. Data, with a text form that parses back.

It knows nothing of costs, threads or ExecuTorch; it reads a task graph. `makers.py` makes schedules, `verify.py`
checks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from doubleweave import _scheduling
from doubleweave.errors import ScheduleError
from doubleweave.schedule.pattern import Int32Array
from doubleweave.schedule.task_graph import TaskGraph

# In a worker's list: the worker goes on when every other one has passed its barrier of the same number, or has ended.
BARRIER = -1
_BARRIER_TEXT = "|"
# A worker that runs the tasks of every device.
ANY = "any"


@dataclass(frozen=True)
class Schedule:
    """`workers[w]` lists the task numbers (and BARRIERs) of worker w in order; it runs tasks of `devices[w]`, and
    each of its methods uses `threads` threads."""

    name: str
    devices: tuple[str, ...]
    workers: tuple[tuple[int, ...], ...]
    threads: int = 1

    @cached_property
    def worker_of(self) -> dict[int, int]:
        """The worker of each task."""
        found = {task: worker for worker, tasks in enumerate(self.workers) for task in tasks}
        return {task: worker for task, worker in found.items() if task != BARRIER}

    def text(self, graph: TaskGraph) -> str:
        """One line a worker: "npu: block_0/0+128@128 | block_1/0+128@128 …"; "|" is a barrier."""
        return "\n".join(
            f"{device}: " + " ".join(_BARRIER_TEXT if task == BARRIER else graph.name(task) for task in tasks)
            for device, tasks in zip(self.devices, self.workers, strict=True)
        )


def parse(text: str, graph: TaskGraph, name: str = "given", threads: int = 1) -> Schedule:
    """Parse the text of `Schedule.text`; raises ScheduleError for a device or a task the graph does not have."""
    numbers = {graph.name(index): index for index in range(len(graph))} | {_BARRIER_TEXT: BARRIER}
    known = {ANY, *graph.devices}
    devices, workers = [], []
    for line in text.strip().splitlines():
        device, colon, tasks = line.partition(":")
        device = device.strip()
        if not colon or device not in known:
            raise ScheduleError(
                f"schedule: found line {line[:40]!r}, expected DEVICE: TASK TASK … with a device of "
                f"{', '.join(sorted(known))}"
            )
        for word in tasks.split():
            if word not in numbers:
                raise ScheduleError(
                    f"schedule: found task {word!r}, expected call/start+tokens@size of the task graph, "
                    f"such as {graph.name(0)!r}"
                )
        devices.append(device)
        workers.append(tuple(numbers[word] for word in tasks.split()))
    return Schedule(name, tuple(devices), tuple(workers), threads)


def without_barriers(schedule: Schedule, graph: TaskGraph) -> tuple[list[list[int]], Int32Array, Int32Array]:
    """The workers' lists without barriers, and the tasks that each task waits for (starts and list, as in a TaskGraph),
    which have the barriers as dependencies."""
    return _scheduling.without_barriers(schedule.workers, graph.after_starts, graph.after_list)
