"""Schedules: both makers' output verifies, text parses back, and what cannot run is refused with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.chunks import cut
from doubleweave.errors import InputError, ScheduleError
from doubleweave.ir import Static, rows
from doubleweave.schedule import SCHEDULES, Schedule, make, parse, verify
from doubleweave.tasks import build


def graph_of(num_tokens=24, num_workers=2, shape=None, num_layers=2):
    shape = shape or rows(1, 8)
    chunks = cut(num_tokens, shape, num_workers)
    return build(toys.split(num_layers, shape), chunks, "last", min(len(chunks), num_workers))


@st.composite
def made(draw):
    """(graph, schedule) for any length, shape, worker count and maker."""
    num_workers = draw(st.integers(1, 5))
    shape = draw(st.sampled_from([rows(1, 8), rows(1, 3), Static((1, 4, 8))]))
    graph = graph_of(draw(st.integers(1, 60)), num_workers, shape, draw(st.integers(1, 3)))
    return graph, make(draw(st.sampled_from(SCHEDULES)), graph, num_workers)


@given(made())
def test_both_makers_give_what_verifies(case):
    graph, schedule = case
    verify(schedule, graph)
    assert sorted(task for tasks in schedule.workers for task in tasks) == list(range(len(graph.tasks)))


@given(made())
def test_text_parses_back(case):
    graph, schedule = case
    assert parse(schedule.text(graph), graph, schedule.name, schedule.threads) == schedule


def test_text_is_one_line_a_worker(golden):
    graph = graph_of(16, 2, num_layers=1)
    golden("schedule.txt", make("pipelined", graph, 2).text(graph))


@given(st.integers(2, 6), st.integers(2, 10))
def test_pipelined_gives_every_worker_something(num_workers, num_chunks):
    graph = graph_of(8 * num_chunks, num_workers)
    schedule = make("pipelined", graph, num_workers)
    assert schedule.threads == 1
    assert len(schedule.workers) == min(num_workers, len(graph.chunks))
    assert all(schedule.workers)
    for tasks in schedule.workers:
        assert [graph.tasks[t].chunk for t in tasks] == sorted(graph.tasks[t].chunk for t in tasks)


def test_one_chunk_runs_with_every_thread():
    graph = graph_of(5, 4)
    assert make("pipelined", graph, 4).workers == make("sequential", graph, 4).workers
    assert make("pipelined", graph, 4).threads == 4


@given(made(), st.randoms(use_true_random=False))
def test_a_missing_task_is_named(case, random):
    graph, schedule = case
    gone = random.randrange(len(graph.tasks))
    workers = tuple(tuple(t for t in tasks if t != gone) for tasks in schedule.workers)
    with pytest.raises(ScheduleError, match=f"{graph.name(gone)} is missing"):
        verify(replace(schedule, workers=workers), graph)


@given(made(), st.randoms(use_true_random=False))
def test_a_doubled_task_is_named(case, random):
    graph, schedule = case
    twice = random.randrange(len(graph.tasks))
    workers = (*schedule.workers[:-1], (*schedule.workers[-1], twice))
    with pytest.raises(ScheduleError, match=f"{graph.name(twice)} is there twice"):
        verify(replace(schedule, workers=workers), graph)


@given(made())
def test_a_backward_order_waits_for_ever(case):
    graph, schedule = case
    workers = tuple(tuple(reversed(tasks)) for tasks in schedule.workers)
    with pytest.raises(ScheduleError, match="wait for ever") as error:
        verify(replace(schedule, workers=workers), graph)
    stuck = [tasks[0] for tasks in workers if tasks]
    assert any(f"stands at {graph.name(task)}, which waits for" in str(error.value) for task in stuck)


def test_two_workers_that_wait_for_each_other_are_both_shown():
    graph = graph_of(8, 1, num_layers=1)
    names = [graph.name(index) for index in range(len(graph.tasks))]
    first, second = names.index("block_1/0"), names.index("lm_head/0")
    rest = tuple(t for t in range(len(names)) if t not in (first, second))
    crossed = Schedule("given", ((second, *rest), (first,)), 1)
    with pytest.raises(
        ScheduleError, match="worker 0 stands at lm_head/0, which waits for block_1/0"
    ) as error:
        verify(crossed, graph)
    assert "worker 1 stands at block_1/0, which waits for" in str(error.value)


def test_unknown_names_are_refused():
    graph = graph_of()
    with pytest.raises(InputError, match=r"found 'fastest', expected one of sequential, pipelined"):
        make("fastest", graph, 1)
    with pytest.raises(ScheduleError, match=r"found task 'block_9/0', expected call/chunk"):
        parse("0: embed_tokens/0 block_9/0", graph)
