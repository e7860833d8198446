"""Contention fitted to runs whose slow-down is known, and waits read off times."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from doubleweave.ir.split import rows
from doubleweave.measure.contention_fit import Ran, fit
from doubleweave.measure.waits import waits_of
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.makers import make
from doubleweave.schedule.schedule import parse
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import build
from doubleweave.schedule.verify import verify


def simulated(contention, seed: int, workers=("npu", "cpu", "cpu")) -> Ran:
    """What a run with that contention would have shown."""
    graph = build(toys.split(4, rows(1, 8), static_device="npu"), cut(80, rows(1, 8)), "last", 8)
    random = np.random.default_rng(seed)
    alone = random.integers(50_000, 500_000, len(graph))
    schedule = make("out_of_order", graph, workers, Costs(alone))
    start, end = times(graph, schedule, Costs(alone, contention=contention))
    worker_of = np.zeros(len(graph), np.int64)
    for worker, tasks in enumerate(schedule.workers):
        worker_of[list(tasks)] = worker
    return Ran([graph.devices[call] for call in graph.call_of.tolist()], worker_of, start, end, alone)


shares = st.floats(0, 0.8)


@settings(max_examples=20)
@given(shares, shares)
def test_what_is_put_in_comes_out(npu_cpu, cpu_npu):
    truth = {("npu", "cpu"): npu_cpu, ("cpu", "npu"): cpu_npu}
    found = fit([simulated(truth, seed, ("npu", "cpu")) for seed in range(4)])
    for pair, value in truth.items():
        assert found[pair] == pytest.approx(value, abs=1e-3), pair
    assert found["npu", "npu"] == found["cpu", "cpu"] == 0


@settings(max_examples=20)
@given(shares, shares, shares)
def test_with_several_neighbours_at_once_it_is_close(npu_cpu, cpu_npu, cpu_cpu):
    truth = {("npu", "cpu"): npu_cpu, ("cpu", "npu"): cpu_npu, ("cpu", "cpu"): cpu_cpu}
    found = fit([simulated(truth, seed) for seed in range(4)])
    for pair, value in truth.items():
        assert found[pair] == pytest.approx(value, abs=0.12), pair
    assert found["npu", "npu"] == 0


def test_workers_that_never_meet_cost_each_other_nothing():
    run = simulated({}, 0, ("any",))
    assert set(fit([run]).values()) == {0.0}


def test_noise_never_makes_neighbours_a_help():
    run = simulated({}, 0)
    quicker = run._replace(alone_ns=run.alone_ns + 5_000)
    assert min(fit([quicker]).values()) == 0.0


def test_a_task_that_was_held_up_does_not_count():
    run = simulated({}, 0)
    end = run.end_ns.copy()
    end[len(end) // 2] += 100 * int(run.alone_ns.max())
    found = fit([run._replace(end_ns=end)])
    assert max(found.values()) < 0.05


def test_waits_are_read_off_the_times():
    graph = build(toys.split(1, rows(1, 8), static_device="npu"), cut(8, rows(1, 8)), "last")
    names = [graph.name(task) for task in range(5)]
    text = f"npu: {' '.join(names[i] for i in (0, 1, 3, 4))}\ncpu: {names[2]}"
    verified = verify(parse(text, graph), graph)
    start = np.array([0, 12, 40, 90, 101])
    end = np.array([10, 30, 80, 100, 110])
    found = waits_of(verified, start, end)
    assert found.hand_overs == {("npu", "cpu"): [10], ("cpu", "npu"): [10]}
    assert found.same_worker == [2, 1]
