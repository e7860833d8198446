"""Every maker's schedule, for random splits, chunks, workers and costs: it verifies, it runs, it is never slower than
one task at a time, and each maker does what its name says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from doubleweave.errors import InputError, ScheduleError
from doubleweave.ir.split import rows
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.costs import Costs, lower_bound_ns
from doubleweave.schedule.makers import MAKERS, make
from doubleweave.schedule.schedule import BARRIER
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import build
from doubleweave.schedule.verify import verify
from random_splits import Case, cases

names = st.sampled_from(sorted(MAKERS))


@settings(max_examples=300)
@given(names, cases(free=False))
def test_every_schedule_verifies_and_simulates(name: str, case: Case) -> None:
    schedule = make(name, case.graph, case.workers, case.costs)
    verified = verify(schedule, case.graph)
    start, end = times(case.graph, schedule, case.costs)
    assert (end - start >= case.costs.duration_ns - 1).all()
    for task, waits in enumerate(verified.after):
        assert all(end[before] <= start[task] + 1 for before in waits)
    for tasks in verified.workers:
        assert all(end[a] <= start[b] + 1 for a, b in itertools.pairwise(tasks))


@settings(max_examples=300)
@given(names, cases())
def test_no_schedule_is_slower_than_one_task_at_a_time(name: str, case: Case) -> None:
    schedule = make(name, case.graph, case.workers, case.costs)
    _, end = times(case.graph, schedule, case.costs)
    alone = make("sequential", case.graph, ("any",), case.costs)
    _, one_by_one = times(case.graph, alone, case.costs)
    assert end.max() <= one_by_one.max() == case.costs.duration_ns.sum()


@settings(max_examples=200)
@given(names, cases())
def test_no_schedule_beats_the_lower_bound(name: str, case: Case) -> None:
    schedule = make(name, case.graph, case.workers, case.costs)
    _, end = times(case.graph, schedule, case.costs)
    bound, why = lower_bound_ns(case.graph, schedule.devices, case.costs)
    assert bound <= end.max()
    assert why


def pipeline(num_chunks: int, block_ns: int, attention_ns: int, in_flight: int = 8, num_layers: int = 6):
    """Blocks on an NPU, attention on a CPU, and their costs."""
    split = toys.split(num_layers, rows(1, 8), static_device="npu")
    graph = build(split, cut(8 * num_chunks, rows(1, 8)), "last", in_flight)
    on_cpu = np.array([device == "cpu" for device in graph.devices])[graph.call_of]
    return graph, Costs(np.where(on_cpu, attention_ns, block_ns).astype(np.int64))


def test_lockstep_has_two_chunks_one_segment_apart():
    graph, costs = pipeline(2, 100, 100)
    schedule = make("lockstep", graph, ("npu", "cpu"), costs)
    steps = [[[]] for _ in schedule.workers]
    for worker, tasks in enumerate(schedule.workers):
        for task in tasks:
            if task == BARRIER:
                steps[worker].append([])
            else:
                steps[worker][-1].append(graph.tasks[task])
    assert len({len(found) for found in steps}) == 1
    for step in zip(*steps, strict=True):
        tasks = [task for found in step for task in found]
        assert {task.chunk for task in tasks} <= {0, 1}
        if len(tasks) == 2:
            (ahead,), (behind,) = ([t for t in tasks if t.chunk == c] for c in (0, 1))
            assert ahead.call == behind.call + 1


def test_pipelined_keeps_to_the_earliest_chunk_that_can_run():
    graph, costs = pipeline(4, 100, 60)
    schedule = make("pipelined", graph, ("npu", "cpu"), costs)
    start, end = times(graph, schedule, costs)
    for task, waits in enumerate(graph.after):
        ready = max((end[before] for before in waits), default=0)
        for other in range(len(graph)):
            same = graph.devices[graph.call_of[other]] == graph.devices[graph.call_of[task]]
            if same and graph.chunk_of[other] > graph.chunk_of[task] and start[other] > ready:
                assert start[other] >= start[task]


def test_out_of_order_lets_later_chunks_overtake_and_hides_the_shorter_device():
    graph, costs = pipeline(6, 100, 100)
    in_order, overtaking = (
        make(name, graph, ("npu", "cpu"), costs) for name in ("pipelined", "out_of_order")
    )
    ends = [times(graph, schedule, costs)[1].max() for schedule in (in_order, overtaking)]
    assert ends[1] <= ends[0]
    bound, _ = lower_bound_ns(graph, ("npu", "cpu"), costs)
    assert bound / ends[1] > 0.9
    overtakes = any(
        graph.chunk_of[a] > graph.chunk_of[b] and graph.call_of[a] < graph.call_of[b]
        for tasks in overtaking.workers
        for a, b in itertools.pairwise(tasks)
    )
    assert overtakes


@pytest.mark.parametrize("num_workers", [2, 3, 4])
@pytest.mark.parametrize(("growth", "at_home"), [(0, 1.0), (10, 0.6)])
def test_a_wavefront_gives_each_chunk_one_worker_and_each_worker_its_share(num_workers, growth, at_home):
    graph = build(toys.split(8, rows(1, 8)), cut(8 * 12, rows(1, 8)), "last", 2 * num_workers)
    on_attention = np.array(["attention" in call.segment for call in graph.split.calls])[graph.call_of]
    costs = Costs(np.where(on_attention, 10 + growth * graph.chunk_of, 100).astype(np.int64))
    schedule = make("wavefront", graph, ("any",) * num_workers, costs)
    shares = np.array(
        [np.bincount(graph.chunk_of[list(tasks)], minlength=12) for tasks in schedule.workers], float
    )
    assert ((shares.max(axis=0) / shares.sum(axis=0)) >= at_home).all()
    _, end = times(graph, schedule, costs)
    bound, _ = lower_bound_ns(graph, schedule.devices, costs)
    assert bound / end.max() > 0.85


def test_sequential_is_one_worker_for_every_device():
    graph, costs = pipeline(3, 100, 60)
    schedule = make("sequential", graph, ("npu", "cpu"), costs, threads=2)
    assert (schedule.devices, schedule.threads) == (("any",), 2)
    assert schedule.workers == (tuple(range(len(graph))),)


def test_unknown_names_and_missing_workers_are_refused():
    graph, costs = pipeline(2, 100, 60)
    with pytest.raises(InputError, match="found 'fastest', expected one of sequential, lockstep, pipelined"):
        make("fastest", graph, ("npu", "cpu"), costs)
    with pytest.raises(
        ScheduleError, match="found npu, but the program has segments for 'cpu'; add a worker"
    ):
        make("pipelined", graph, ("npu",), costs)
