"""Check a schedule before it runs: every task once, on its device, nothing read before it is written, no deadlock,
no buffer overwritten that is still read, no instance on two workers at once.

A task may rely on the tasks that surely ended before it: by its worker's order and by the tasks that it waits for. The
checks read the split itself, not the graph's dependencies: a mistake in the pattern, which makers, simulator and
executor share, is found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from doubleweave.errors import ScheduleError
from doubleweave.schedule.pattern import has_instance_per_worker
from doubleweave.schedule.schedule import ANY, BARRIER, Schedule, without_barriers
from doubleweave.schedule.task_graph import TaskGraph, lists_of

_SHOWN = 3  # tasks before and behind a marked one


@dataclass(frozen=True)
class Verified:
    """A schedule that may run; only `verify` makes it, so that nothing unchecked reaches the native executor. Task t
    waits for the tasks `after[t]`, which have the barriers of `schedule` as dependencies; `workers` has none."""

    schedule: Schedule
    graph: TaskGraph
    workers: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]


def verify(schedule: Schedule, graph: TaskGraph) -> Verified:
    """Raises ScheduleError, with the grid and the offending row marked, where the schedule may not run."""
    _check_places(schedule, graph)
    # Barriers become dependencies, so that one rule serves both.
    lists, starts, found = without_barriers(schedule, graph)
    after = lists_of(starts, found)
    stands = {task: (w, place) for w, tasks in enumerate(lists) for place, task in enumerate(tasks)}
    clocks = _clocks(schedule, graph, lists, after, stands)
    for earlier, later, why in _required(graph):
        worker, place = stands[earlier]
        # The clock counts the tasks of that worker that have ended: `earlier`, at that place, must be among them.
        if clocks[later][worker] <= place:
            _refuse(
                f"{graph.name(later)} {why} {graph.name(earlier)}, but nothing makes it wait for that",
                schedule,
                graph,
                {later, earlier},
            )
    return Verified(schedule, graph, tuple(map(tuple, lists)), after)


def _check_places(schedule: Schedule, graph: TaskGraph) -> None:
    def refuse(what: str, *marked: int) -> NoReturn:
        _refuse(what, schedule, graph, set(marked))

    if not schedule.workers or len(schedule.devices) != len(schedule.workers):
        raise ScheduleError(
            f"schedule: found {len(schedule.workers)} workers and {len(schedule.devices)} devices, expected at least "
            "one worker, and a device for each"
        )
    if schedule.threads < 1:
        raise ScheduleError(f"schedule: found {schedule.threads} threads a worker, expected at least 1")
    seen: set[int] = set()
    for device, tasks in zip(schedule.devices, schedule.workers, strict=True):
        for task in tasks:
            if task == BARRIER:
                continue
            if not 0 <= task < len(graph):
                raise ScheduleError(
                    f"schedule: found task {task}, expected 0 to {len(graph) - 1} (the tasks of the graph)"
                )
            if task in seen:
                refuse(
                    f"{graph.name(task)} is there twice; each of the {len(graph)} tasks must be placed once",
                    task,
                )
            needs = graph.devices[graph.call_of[task]]
            if device not in (ANY, needs):
                refuse(f"{graph.name(task)} is for device {needs!r}, but is on a worker of {device!r}", task)
            seen.add(task)
    if len(seen) < len(graph):
        missing = next(task for task in range(len(graph)) if task not in seen)
        refuse(f"{graph.name(missing)} is missing; each of the {len(graph)} tasks must be placed once")


def _clocks(
    schedule: Schedule,
    graph: TaskGraph,
    lists: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    stands: Mapping[int, tuple[int, int]],
) -> list[list[int]]:
    """clocks[t][w]: how many tasks of worker w have surely ended when t starts; refuses deadlocks.

    `stands[t]` is the worker of task t and t's place in its list. The clocks are vector clocks (Fidge, Mattern, 1988).
    """
    clocks: list[list[int]] = [[] for _ in range(len(graph))]
    position = [0] * len(lists)

    def waits_for(task: int) -> list[int]:
        """The tasks that keep `task` from starting: their workers have not come past them."""
        return [before for before in after[task] if position[stands[before][0]] <= stands[before][1]]

    # Every worker goes on as far as it can, in turn; a round in which none moves is the end, or a deadlock.
    moved = True
    while moved:
        moved = False
        for worker, tasks in enumerate(lists):
            while position[worker] < len(tasks):
                task = tasks[position[worker]]
                if waits_for(task):
                    break
                # A task knows all that the worker's last task and those it waits for knew, and these themselves.
                clock = list(clocks[tasks[position[worker] - 1]]) if position[worker] else [0] * len(lists)
                clock[worker] = position[worker]
                for before in after[task]:
                    other, place = stands[before]
                    clock = [max(a, b) for a, b in zip(clock, clocks[before], strict=True)]
                    clock[other] = max(clock[other], place + 1)
                clocks[task] = clock
                position[worker] += 1
                moved = True
    stuck = {tasks[position[w]]: w for w, tasks in enumerate(lists) if position[w] < len(tasks)}
    if stuck:
        rows = [
            f"worker {worker} stands at {graph.name(task)}, which waits for "
            + ", ".join(map(graph.name, waits_for(task)))
            for task, worker in stuck.items()
        ]
        _refuse("its tasks would wait for ever: " + "; ".join(rows), schedule, graph, set(stuck))
    return clocks


def _required(graph: TaskGraph) -> Iterator[tuple[int, int, str]]:
    """(earlier, later, why): pairs of tasks of which the first must have ended, read off the split and the buffers."""
    split = graph.split
    writer = split.writer()
    kinds = {value.name: value.kind for value in split.values}
    # The calls that read each value of a cache with a window.
    seen_by: dict[str, list[int]] = {value.name: [] for value in split.values if value.window}
    for call_index, call in enumerate(split.calls):
        for name in seen_by.keys() & set(call.reads):
            seen_by[name].append(call_index)
    calls, chunks = graph.call_of.tolist(), graph.chunk_of.tolist()
    number = {pair: task for task, pair in enumerate(zip(calls, chunks, strict=True))}
    users: dict[int, list[int]] = {}
    holds: dict[int, tuple[str, int]] = {}
    last_run: dict[str, int] = {}
    has_copies = [has_instance_per_worker(split, call) for call in range(len(split.calls))]
    for task, (call_index, chunk) in enumerate(zip(calls, chunks, strict=True)):
        call = split.calls[call_index]
        for name in call.reads:
            if name not in writer:
                continue
            # A call that reads the cache it appends to reads the rows of the chunks before.
            if writer[name] != call_index:
                yield number[writer[name], chunk], task, "reads what comes from"
            if kinds[name] in ("cache", "state") and chunk:
                yield number[writer[name], chunk - 1], task, "goes on from"
        for name in call.writes:
            if kinds[name] == "cache" and chunk:
                yield number[call_index, chunk - 1], task, "appends behind the rows of"
            # There is room for the window and one chunk: a row takes the place of one that the chunk before saw.
            for reader in seen_by.get(name, ()):
                if (reader, chunk - 1) in number:
                    yield number[reader, chunk - 1], task, "overwrites rows of the window of"
        # The listed order is one in which buffers are used rightly: whoever used one comes before its next writer.
        for name in (*call.reads, *call.writes):
            if kinds[name] not in ("chunk", "output"):
                continue
            buffer = graph.buffer(name, chunk)
            if holds.get(buffer) != (name, chunk):
                for user in users.get(buffer, ()):
                    yield user, task, "overwrites a buffer of"
                holds[buffer], users[buffer] = (name, chunk), []
            users[buffer].append(task)
        # Inputs, outputs and planned memory of an instance serve one run at a time. Waiting is transitive, so pairs of
        # neighbouring runs are enough.
        if not has_copies[call_index]:
            if call.segment in last_run:
                yield last_run[call.segment], task, "runs in the same instance as"
            last_run[call.segment] = task


def _refuse(what: str, schedule: Schedule, graph: TaskGraph, marked: set[int]) -> NoReturn:
    raise ScheduleError(f"schedule: {what}\n{grid(schedule, graph, marked)}")


def grid(schedule: Schedule, graph: TaskGraph, marked: set[int]) -> str:
    """The workers' rows around the marked tasks; ">" marks a row that has one, brackets mark the task."""
    rows = []
    for worker, (device, tasks) in enumerate(zip(schedule.devices, schedule.workers, strict=True)):
        places = [place for place, task in enumerate(tasks) if task in marked]
        first = max(0, (places[0] if places else 0) - _SHOWN)
        last = min(len(tasks), (places[-1] if places else 0) + _SHOWN + 1)
        last = min(last, first + 4 * _SHOWN)
        words = [_word(task, graph, marked) for task in tasks[first:last]]
        shown = ["…"] * (first > 0) + words + ["…"] * (last < len(tasks))
        rows.append(f"{'>' if places else ' '} worker {worker} {device}: " + " ".join(shown))
    return "\n".join(rows)


def _word(task: int, graph: TaskGraph, marked: set[int]) -> str:
    if task == BARRIER:
        return "|"
    name = graph.name(task) if 0 <= task < len(graph) else str(task)
    return f"[{name}]" if task in marked else name
