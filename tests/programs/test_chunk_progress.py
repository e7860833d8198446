"""Chunks are told of while a run goes on, in order, the last one always."""

from __future__ import annotations

import time

import numpy as np
import pytest

import toys
from doubleweave.ir.split import rows
from doubleweave.runtime.llm import chunk_progress
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import make
from doubleweave.schedule.task_graph import build
from doubleweave.schedule.verify import verify


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_chunks_are_counted_up_to_all_of_them(toy_program, schedule):
    session = toy_program.session(schedule, 2, chunk=8)
    told = []
    session.on_chunk = lambda done, total: told.append((done, total))
    session.append(np.arange(40) % toys.VOCAB_SIZE)
    assert told
    assert told[-1] == (5, 5)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


class SlowExecution:
    """Each time it is asked, one more task of the only worker has finished."""

    def __init__(self, num_tasks):
        self.finished, self.num_tasks = 0, num_tasks

    def num_finished(self):
        self.finished = min(self.finished + 1, self.num_tasks)
        return [self.finished]


def test_every_chunk_of_a_slow_run_is_told_of(monkeypatch):
    graph = build(toys.split(2, rows(1, 8)), cut(24, rows(1, 8)), "last", 1)
    verified = verify(make("sequential", graph, ("any",), toys.unit_costs(graph)), graph)
    monkeypatch.setattr(chunk_progress, "_PERIOD_S", 0.001)
    execution, told = SlowExecution(len(graph)), []
    with chunk_progress.watching(execution, verified, lambda done, total: told.append((done, total))):
        while execution.finished < execution.num_tasks:
            time.sleep(0.001)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_run_that_fails_ends_the_watching(toy_program):
    session = toy_program.session("sequential", 1)
    session.on_chunk = lambda done, total: None
    with pytest.raises(ValueError, match="token ids"):
        session.append([toys.VOCAB_SIZE])
    session.append([1])
