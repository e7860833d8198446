"""Schedules: for each worker, the ordered list of its tasks. Data, with a text form that parses back.

It knows nothing of threads or ExecuTorch; it reads a task graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from doubleweave.errors import InputError, ScheduleError
from doubleweave.tasks import TaskGraph

SCHEDULES = ("sequential", "pipelined")


@dataclass(frozen=True)
class Schedule:
    """`workers[w]` lists the task numbers of worker w in order; each worker uses `threads` threads."""

    name: str
    workers: tuple[tuple[int, ...], ...]
    threads: int

    def text(self, graph: TaskGraph) -> str:
        """One line a worker: "0: embed_tokens/0 block_0/0 …"."""
        return "\n".join(
            f"{number}: " + " ".join(graph.name(task) for task in tasks)
            for number, tasks in enumerate(self.workers)
        )


def parse(text: str, graph: TaskGraph, name: str = "given", threads: int = 1) -> Schedule:
    """Parse what `Schedule.text` gives; raises ScheduleError for tasks the graph does not have."""
    numbers = {graph.name(index): index for index in range(len(graph.tasks))}
    workers = []
    for line in text.strip().splitlines():
        _, _, tasks = line.partition(":")
        unknown = [word for word in tasks.split() if word not in numbers]
        if unknown:
            raise ScheduleError(
                f"schedule: found task {unknown[0]!r}, expected call/chunk of the task graph, "
                f"such as {graph.name(0)!r}"
            )
        workers.append(tuple(numbers[word] for word in tasks.split()))
    return Schedule(name, tuple(workers), threads)


def make(name: str, graph: TaskGraph, threads: int) -> Schedule:
    """Make the schedule of that name; raises InputError for a name that does not exist."""
    if name == "sequential":
        return sequential(graph, threads)
    if name == "pipelined":
        return pipelined(graph, threads)
    raise InputError(f"schedule: found {name!r}, expected one of {', '.join(SCHEDULES)}")


def sequential(graph: TaskGraph, threads: int) -> Schedule:
    """One worker, chunk behind chunk, every thread in every method."""
    return Schedule("sequential", (tuple(range(len(graph.tasks))),), threads)


def pipelined(graph: TaskGraph, num_workers: int) -> Schedule:
    """One-thread workers that take the chunks in turn, each chunk a layer or so behind the one before.

    A chunk stays on one worker: its values stay in that core's cache, and workers meet only where a chunk
    needs the rows of earlier ones. With a single chunk there is nothing to overlap: it runs with every
    thread in every method.
    """
    if len(graph.chunks) == 1 or num_workers == 1:
        return Schedule("pipelined", sequential(graph, num_workers).workers, num_workers)
    workers = min(num_workers, len(graph.chunks))
    rows = [
        tuple(number for number, task in enumerate(graph.tasks) if task.chunk % workers == worker)
        for worker in range(workers)
    ]
    return Schedule("pipelined", tuple(rows), 1)


def verify(schedule: Schedule, graph: TaskGraph) -> None:
    """Check that every task runs exactly once and none waits for ever; raises ScheduleError."""
    placed = [task for tasks in schedule.workers for task in tasks]
    if sorted(placed) != list(range(len(graph.tasks))):
        missing = sorted(set(range(len(graph.tasks))) - set(placed))
        doubled = sorted({task for task in placed if placed.count(task) > 1})
        what = (
            f"{graph.name(missing[0])} is missing" if missing else f"{graph.name(doubled[0])} is there twice"
        )
        raise ScheduleError(f"schedule: {what}; each of the {len(graph.tasks)} tasks must be placed once")
    done: set[int] = set()
    position = [0] * len(schedule.workers)
    moved = True
    while moved:
        moved = False
        for worker, tasks in enumerate(schedule.workers):
            while position[worker] < len(tasks) and done.issuperset(graph.after[tasks[position[worker]]]):
                done.add(tasks[position[worker]])
                position[worker] += 1
                moved = True
    if len(done) < len(graph.tasks):
        rows = [
            f"  worker {worker} stands at {graph.name(tasks[position[worker]])}, which waits for "
            + ", ".join(graph.name(t) for t in graph.after[tasks[position[worker]]] if t not in done)
            for worker, tasks in enumerate(schedule.workers)
            if position[worker] < len(tasks)
        ]
        raise ScheduleError("schedule: its tasks would wait for ever:\n" + "\n".join(rows))
