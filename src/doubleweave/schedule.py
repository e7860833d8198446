"""Schedules: for each worker, the ordered list of its tasks. Data, with a text form that parses back.

It knows nothing of threads or ExecuTorch; it reads a task graph and estimated costs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from doubleweave.errors import InputError, ScheduleError
from doubleweave.ir import Segment
from doubleweave.tasks import TaskGraph

SCHEDULES = ("sequential", "pipelined")

# Throughput of one core, to place tasks by before anything is measured: seconds per weight byte and row,
# seconds per multiply-add of attention, seconds a task.
_SECONDS_PER_WEIGHT_BYTE_ROW = 4.7e-12
_SECONDS_PER_ATTENTION_MAC = 2.0e-11
_SECONDS_PER_TASK = 5e-6


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
    """One-thread workers, each taking the next task that can start, earlier chunks first.

    With a single chunk there is nothing to overlap: it runs with every thread in every method.
    """
    if len(graph.chunks) == 1 or num_workers == 1:
        return Schedule("pipelined", sequential(graph, num_workers).workers, num_workers)
    seconds = estimate(graph)
    waiting = [len(after) for after in graph.after]
    readers: list[list[int]] = [[] for _ in graph.tasks]
    for task, after in enumerate(graph.after):
        for earlier in after:
            readers[earlier].append(task)
    ready_at = [0.0] * len(graph.tasks)
    ready = [task for task, count in enumerate(waiting) if count == 0]
    free_at = [(0.0, worker) for worker in range(num_workers)]
    workers: list[list[int]] = [[] for _ in range(num_workers)]
    while ready:
        now, worker = heapq.heappop(free_at)
        # Task numbers go up with the chunk, so among those that can start now the smallest is the oldest.
        task = min(ready, key=lambda t: (max(now, ready_at[t]), t))
        ready.remove(task)
        end = max(now, ready_at[task]) + seconds[task]
        workers[worker].append(task)
        heapq.heappush(free_at, (end, worker))
        for reader in readers[task]:
            ready_at[reader] = max(ready_at[reader], end)
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    return Schedule("pipelined", tuple(map(tuple, workers)), 1)


def estimate(graph: TaskGraph) -> list[float]:
    """Seconds each task may take on one core, from its operations alone."""
    segments = {segment.name: segment for segment in graph.split.segments}
    result = []
    for task in graph.tasks:
        chunk = graph.chunks[task.chunk]
        result.append(_seconds(segments[graph.split.calls[task.call].segment], chunk))
    return result


def _seconds(segment: Segment, chunk: Sequence[int]) -> float:
    start, num_tokens, compiled_size = chunk
    if segment.backend == "portable":
        width = sum(size for size in segment.inputs[0].shape[2:] if isinstance(size, int))
        # Causal: a chunk's rows see all keys before it and half of its own.
        keys = start + num_tokens / 2
        return _SECONDS_PER_TASK + _SECONDS_PER_ATTENTION_MAC * 2 * num_tokens * keys * width
    if segment.num_delegated == 0:
        return _SECONDS_PER_TASK
    return _SECONDS_PER_TASK + _SECONDS_PER_WEIGHT_BYTE_ROW * segment.weight_bytes * compiled_size


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
