"""Verify: what it lets through runs, what it refuses could not, and the message shows where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from doubleweave.errors import ScheduleError
from doubleweave.ir.split import rows
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import MAKERS, make
from doubleweave.schedule.schedule import ANY, BARRIER, Schedule, parse
from doubleweave.schedule.task_graph import TaskGraph, build
from doubleweave.schedule.verify import verify
from random_splits import Case, cases, mutate

names = st.sampled_from(sorted(MAKERS))


def is_placed_once(schedule: Schedule, graph: TaskGraph) -> bool:
    tasks = [task for found in schedule.workers for task in found if task != BARRIER]
    return sorted(tasks) == list(range(len(graph))) and all(
        device in (ANY, graph.devices[graph.call_of[task]])
        for device, found in zip(schedule.devices, schedule.workers, strict=True)
        for task in found
        if task != BARRIER
    )


def comes_to_its_end(schedule: Schedule, graph: TaskGraph) -> bool:
    """Play it: a worker goes on when its next task's dependencies are done, or all stand at or past its barrier."""
    place, passed, done = [0] * len(schedule.workers), [0] * len(schedule.workers), set()
    moved = True
    while moved:
        moved = False
        for worker, tasks in enumerate(schedule.workers):
            if place[worker] == len(tasks):
                continue
            task = tasks[place[worker]]
            if task == BARRIER:
                here = passed[worker] + 1
                ready = all(
                    place[w] == len(other)
                    or (passed[w] >= here)
                    or (passed[w] == here - 1 and stands(w, place, schedule))
                    for w, other in enumerate(schedule.workers)
                )
                passed[worker] += ready
            else:
                ready = done.issuperset(graph.after[task])
                done |= {task} if ready else set()
            place[worker] += ready
            moved |= ready
    return all(at == len(tasks) for at, tasks in zip(place, schedule.workers, strict=True))


def stands(worker: int, place: list[int], schedule: Schedule) -> bool:
    return schedule.workers[worker][place[worker]] == BARRIER


@settings(max_examples=400)
@given(names, cases(), st.randoms(use_true_random=False))
def test_random_mutations_are_refused_exactly_where_they_are_illegal(name, case: Case, random) -> None:
    graph = case.graph
    schedule = mutate(make(name, graph, case.workers, case.costs), graph, random)
    is_legal = is_placed_once(schedule, graph) and comes_to_its_end(schedule, graph)
    if is_legal:
        assert verify(schedule, graph).schedule == schedule
    else:
        with pytest.raises(ScheduleError):
            verify(schedule, graph)


def ways(verified, random, count: int = 4):
    """Random orders in which the tasks may run."""
    for _ in range(count):
        place, order, done = [0] * len(verified.workers), [], set()
        while len(order) < len(verified.graph):
            free = [
                w
                for w, tasks in enumerate(verified.workers)
                if place[w] < len(tasks) and done.issuperset(verified.after[tasks[place[w]]])
            ]
            worker = random.choice(free)
            order.append(verified.workers[worker][place[worker]])
            done.add(order[-1])
            place[worker] += 1
        yield order


def is_right(graph: TaskGraph, order: list[int]) -> bool:
    """Whether every task finds, in its buffers and caches, what it reads."""
    kinds = {value.name: value.kind for value in graph.split.values}
    holds: dict[int, tuple[str, int]] = {}
    appended: dict[str, int] = {}
    for number in order:
        task = graph.tasks[number]
        call = graph.split.calls[task.call]
        for value in call.reads:
            if kinds[value] == "cache" and appended.get(value, 0) < task.chunk + 1:
                return False
            if kinds[value] == "chunk" and holds.get(graph.buffer(value, task.chunk)) != (value, task.chunk):
                return False
        for value in call.writes:
            if kinds[value] == "cache":
                if appended.get(value, 0) != task.chunk:
                    return False
                appended[value] = task.chunk + 1
            else:
                holds[graph.buffer(value, task.chunk)] = (value, task.chunk)
    return True


@settings(max_examples=300)
@given(names, cases(), st.randoms(use_true_random=False))
def test_a_graph_that_forgot_a_dependency_is_not_trusted(name, case: Case, random) -> None:
    """Verify reads the split: where it accepts without some dependencies, every order of the tasks is right."""
    graph = case.graph
    kept = [tuple(b for b in after if random.random() < 0.7) for after in graph.after]
    starts = np.zeros(len(graph) + 1, np.int32)
    np.cumsum([len(after) for after in kept], out=starts[1:])
    found = np.array([b for after in kept for b in after], np.int32)
    careless = replace(graph, after_starts=starts, after_list=found)
    try:
        verified = verify(make(name, graph, case.workers, case.costs), careless)
    except ScheduleError:
        return
    assert all(is_right(graph, order) for order in ways(verified, random))


def two_chunks(in_flight: int = 2) -> TaskGraph:
    return build(toys.split(1, rows(1, 8), static_device="npu"), cut(16, rows(1, 8)), "last", in_flight)


def test_a_forgotten_dependency_is_named_with_both_tasks():
    graph = two_chunks()
    nothing = replace(
        graph, after_starts=np.zeros(len(graph) + 1, np.int32), after_list=np.zeros(0, np.int32)
    )
    with pytest.raises(ScheduleError) as refused:
        verify(make("pipelined", graph, ("npu", "cpu"), toys.unit_costs(graph)), nothing)
    assert str(refused.value).splitlines()[0] == (
        "schedule: attention_0/8+8@8 reads what comes from block_0/8+8@8, but nothing makes it wait for that"
    )


LINES = """npu: embed_tokens/0+8@8 block_0/0+8@8 embed_tokens/8+8@8 block_0/8+8@8 block_1/8+8@8 lm_head/8+8@8
cpu: attention_0/8+8@8"""


@pytest.mark.parametrize(
    ("change", "message", "marked"),
    [
        (("", ""), None, None),
        (
            ("block_0/0+8@8 embed_tokens/8+8@8", "embed_tokens/8+8@8"),
            "block_0/0+8@8 is missing; each of the 7 tasks must be placed once",
            None,
        ),
        (
            ("cpu: ", "cpu: attention_0/8+8@8 "),
            "attention_0/8+8@8 is there twice",
            "> worker 1 cpu: [attention_0/8+8@8] [attention_0/8+8@8]",
        ),
        (
            ("\ncpu: ", " attention_0/8+8@8\ncpu: "),
            "attention_0/8+8@8 is for device 'cpu', but is on a worker of 'npu'",
            "> worker 0 npu: … block_0/8+8@8 block_1/8+8@8 lm_head/8+8@8 [attention_0/8+8@8]",
        ),
        (
            ("block_1/8+8@8 lm_head/8+8@8", "lm_head/8+8@8 block_1/8+8@8"),
            "wait for ever: worker 0 stands at lm_head/8+8@8, which waits for block_1/8+8@8",
            "> worker 0 npu: … block_0/0+8@8 embed_tokens/8+8@8 block_0/8+8@8 [lm_head/8+8@8] block_1/8+8@8",
        ),
        (
            ("embed_tokens/0+8@8 block_0/0+8@8", "block_0/0+8@8 embed_tokens/0+8@8"),
            "worker 0 stands at block_0/0+8@8, which waits for embed_tokens/0+8@8; worker 1 stands at",
            "> worker 0 npu: [block_0/0+8@8] embed_tokens/0+8@8 embed_tokens/8+8@8 block_0/8+8@8 …",
        ),
        (
            ("attention_0/8+8@8", "attention_0/8+8@8 |"),
            None,
            None,
        ),
    ],
)
def test_the_message_shows_the_grid_with_the_row_marked(change, message, marked):
    graph = two_chunks()
    schedule = parse(LINES.replace(*change, 1) if change[0] else LINES, graph)
    if message is None:
        assert verify(schedule, graph).workers
        return
    with pytest.raises(ScheduleError) as refused:
        verify(schedule, graph)
    first, *grid = str(refused.value).splitlines()
    assert message in first
    assert len(grid) == 2
    assert [line for line in grid if line.startswith(">")][:1] == ([marked] if marked else [])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("given", (), ()), "found 0 workers and 0 devices, expected at least one worker"),
        (Schedule("given", ("any",), ((), ())), "found 2 workers and 1 devices"),
        (Schedule("given", ("any",), ((0, 7),)), r"found task 7, expected 0 to 6 \(the tasks of the graph\)"),
        (Schedule("given", ("any",), ((-2,),)), "found task -2, expected 0 to 6"),
        (Schedule("given", ("any",), (tuple(range(7)),), 0), "found 0 threads a worker, expected at least 1"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule, message):
    with pytest.raises(ScheduleError, match=message):
        verify(schedule, two_chunks())
