"""Schedules as text: it parses back, and what it cannot be is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import ScheduleError
from doubleweave.ir.split import rows
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import MAKERS, make
from doubleweave.schedule.schedule import BARRIER, Schedule, parse, without_barriers
from doubleweave.schedule.task_graph import build
from random_splits import Case, cases


@given(st.sampled_from(sorted(MAKERS)), cases())
def test_text_parses_back(name: str, case: Case) -> None:
    schedule = make(name, case.graph, case.workers, case.costs, threads=3)
    assert parse(schedule.text(case.graph), case.graph, schedule.name, 3) == schedule


def test_text_is_one_line_a_worker(golden):
    split = toys.split(1, rows(1, 8), static_device="npu")
    graph = build(split, cut(14, rows(1, 8)), "last", 2)
    golden("schedule.txt", make("lockstep", graph, ("npu", "cpu"), toys.unit_costs(graph)).text(graph))


def test_mixed_sizes_are_named_in_full():
    from doubleweave.ir.split import FixedSizes

    shape = FixedSizes((1, 4, 8))
    graph = build(toys.split(1, shape), cut(11, shape), "last")
    assert [graph.name(t).partition("/")[2] for t in range(0, len(graph), 3)][:2] == ["0+8@8", "8+3@4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cpu: embed_tokens/0+8@8 block_9/0+8@8",
            r"found task 'block_9/0\+8@8', expected call/start\+tokens@size",
        ),
        ("tpu: embed_tokens/0+8@8", "found line 'tpu: embed_tokens/0\\+8@8', expected DEVICE: .* any, cpu"),
        ("embed_tokens", "found line 'embed_tokens', expected DEVICE: TASK"),
    ],
)
def test_what_the_graph_does_not_have_is_refused(text, message):
    graph = build(toys.split(1, rows(1, 8)), cut(8, rows(1, 8)), "last")
    with pytest.raises(ScheduleError, match=message):
        parse(text, graph)


def test_a_barrier_waits_for_what_stands_before_it_everywhere():
    graph = build(toys.split(2, rows(1, 8)), cut(24, rows(1, 8)), "last", 3)
    left, right = (0, 1, BARRIER, 2, BARRIER, BARRIER, 3), (BARRIER, 9, 8, BARRIER, 10)
    schedule = Schedule("given", ("cpu", "cpu"), (left, right))
    lists, starts, found = without_barriers(schedule, graph)
    assert lists == [[0, 1, 2, 3], [9, 8, 10]]
    waits = [set(found[starts[task] : starts[task + 1]].tolist()) for task in range(len(graph))]
    # 9 stands behind the first barrier of its worker, 3 behind the third, which the other worker does not have.
    for task, before in ((9, 1), (2, 1), (10, 2), (3, 10)):
        assert before in waits[task] or task == 2
    assert 8 not in waits[2] - set(graph.after[2]) or 8 in graph.after[2]
