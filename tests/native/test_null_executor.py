"""The native executor on null tasks (copies of a few bytes): random schedules run in an order that their dependencies
allow, and random illegal ones are refused or run, but never hang."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from doubleweave import _native
from doubleweave.errors import ScheduleError
from doubleweave.ir.split import rows
from doubleweave.runtime.llm.bind import bind
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import MAKERS, make
from doubleweave.schedule.schedule import BARRIER
from doubleweave.schedule.task_graph import build
from doubleweave.schedule.verify import verify
from random_splits import Case, cases, mutate

names = st.sampled_from(sorted(MAKERS))
LIMIT_S = 20
CELL = 8


def run(workers, after):
    """Each task copies the cell of one that it waits for, task 0 of the file's beginning. Returns cells and events.

    Fails the test where that takes longer than LIMIT_S.
    """
    cells = np.zeros(len(after) + 1, np.int64)
    cells[0] = 42
    tasks = [
        _native.Task.of_copy(
            _native.Copy(
                source=0,
                target=0,
                block_bytes=CELL,
                source_offset=CELL * (waits[-1] + 1 if waits else 0),
                target_offset=CELL * (number + 1),
            ),
            list(waits),
            number,
        )
        for number, waits in enumerate(after)
    ]
    execution = _native.Execution([], [_native.Region.of(cells)], tasks, [list(tasks) for tasks in workers])
    found = []
    thread = threading.Thread(target=lambda: found.append(execution.run(record=True)), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "the executor hangs"
    assert found, "the executor failed"
    return cells, found[0]


@settings(max_examples=150)
@given(names, cases())
def test_tasks_start_after_what_they_wait_for(name: str, case: Case) -> None:
    verified = verify(make(name, case.graph, case.workers, case.costs), case.graph)
    cells, events = run(verified.workers, verified.after)
    assert (cells == 42).all()
    assert sorted(events[:, 0].tolist()) == list(range(len(case.graph)))
    start, end = np.zeros((2, len(case.graph)), np.int64)
    start[events[:, 0]], end[events[:, 0]] = events[:, 2], events[:, 3]
    for task, waits in enumerate(verified.after):
        assert all(end[before] <= start[task] for before in waits)


@settings(max_examples=300)
@given(names, cases(), st.randoms(use_true_random=False))
def test_whatever_it_is_given_it_comes_to_an_end(name: str, case: Case, random) -> None:
    """The executor checks for itself: what Python's verify refuses never starts, or runs to its end."""
    schedule = mutate(make(name, case.graph, case.workers, case.costs), case.graph, random)
    workers = [[task for task in tasks if task != BARRIER] for tasks in schedule.workers]
    is_complete = sorted(task for tasks in workers for task in tasks) == list(range(len(case.graph)))
    refusal = ""
    try:
        cells, _ = run(workers, case.graph.after)
    except _native.Error as error:
        refusal = str(error)
    if refusal:
        assert not is_complete or "wait for ever" in refusal
    else:
        assert is_complete
        assert (cells == 42).all()


def test_only_verified_schedules_are_bound():
    graph = build(toys.split(1, rows(1, 8)), cut(8, rows(1, 8)), "last")
    schedule = make("sequential", graph, ("any",), toys.unit_costs(graph))
    with pytest.raises(ScheduleError, match="found a Schedule, expected what verify gives; verify it first"):
        bind(schedule, (), {}, None, all_rows=False)
