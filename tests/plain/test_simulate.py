"""Simulated runs against times worked out by hand, and costs' lower bound."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import ScheduleError
from doubleweave.ir.split import rows
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.costs import Costs, lower_bound_ns
from doubleweave.schedule.schedule import parse
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import TaskGraph, build

# One chunk: embed_tokens, block_0, attention_0, block_1, lm_head, each waiting for the one before.
ONE = [10, 20, 30, 40, 50]


def one_chunk() -> TaskGraph:
    return build(toys.split(1, rows(1, 8), static_device="npu"), cut(8, rows(1, 8)), "last")


def two_chunks() -> TaskGraph:
    """Of chunk 0 embed_tokens and block_0 alone; attention and what follows are needed for the last chunk only."""
    return build(toys.split(1, rows(1, 8), static_device="npu"), cut(16, rows(1, 8)), "last", 2)


def run(graph: TaskGraph, text: str, costs: Costs) -> tuple[list[int], list[int]]:
    start, end = times(graph, parse(text, graph), costs)
    return start.tolist(), end.tolist()


def test_one_worker_runs_one_task_behind_the_other():
    graph = one_chunk()
    text = "any: " + " ".join(map(graph.name, range(5)))
    start, end = run(graph, text, Costs(np.array(ONE), same_worker_ns=3))
    assert start == [0, 13, 36, 69, 112]
    assert end == [10, 33, 66, 109, 162]


def test_a_task_behind_one_of_the_same_call_takes_its_share():
    graph = two_chunks()
    names = [graph.name(task) for task in range(len(graph))]
    together = ["embed_tokens/0+8@8", "embed_tokens/8+8@8", "block_0/0+8@8", "block_0/8+8@8"]
    rest = [name for name in names if name not in together]
    costs = Costs(np.full(len(graph), 100), repeated=np.full(len(graph), 0.7))
    start, end = run(graph, "any: " + " ".join(together + rest), costs)
    took = {name: b - a for name, a, b in zip(names, start, end, strict=True)}
    assert [took[name] for name in together] == [100, 70, 100, 70]
    assert {took[name] for name in rest} == {100}


def test_hand_overs_are_paid_where_a_dependency_crosses_workers():
    graph = one_chunk()
    npu = " ".join(graph.name(task) for task in (0, 1, 3, 4))
    costs = Costs(np.array(ONE), {("npu", "cpu"): 7, ("cpu", "npu"): 100})
    start, end = run(graph, f"npu: {npu}\ncpu: {graph.name(2)}", costs)
    assert start == [0, 10, 37, 167, 207]
    assert end == [10, 30, 67, 207, 257]


def test_tasks_that_overlap_slow_each_other_down():
    graph = two_chunks()
    names = {graph.name(task): task for task in range(len(graph))}
    first, second = names["block_0/0+8@8"], names["embed_tokens/8+8@8"]
    duration = np.zeros(len(graph), np.int64)
    duration[[first, second]] = 20, 20
    left = [name for name in names if "/0+8@8" in name]
    right = [name for name in names if "/8+8@8" in name]
    costs = Costs(duration, contention={("npu", "npu"): 1.0})
    start, end = run(graph, f"any: {' '.join(left)}\nany: {' '.join(right)}", costs)
    assert start[first] == start[second] == 0
    assert end[first] == end[second] == 40
    free = Costs(duration)
    assert run(graph, f"any: {' '.join(left)}\nany: {' '.join(right)}", free)[1][second] == 20


def test_contention_ends_with_the_other_task():
    graph = two_chunks()
    names = {graph.name(task): task for task in range(len(graph))}
    short, long = names["block_0/0+8@8"], names["embed_tokens/8+8@8"]
    duration = np.zeros(len(graph), np.int64)
    duration[[short, long]] = 20, 100
    left = [name for name in names if "/0+8@8" in name]
    right = [name for name in names if "/8+8@8" in name]
    text = f"any: {' '.join(left)}\nany: {' '.join(right)}"
    _, end = run(graph, text, Costs(duration, contention={("npu", "npu"): 0.5}))
    # Both run until 30; by then the long one has done 20 of its 100.
    assert (end[short], end[long]) == (30, 110)


def test_a_barrier_holds_the_others_back():
    graph = two_chunks()
    duration = np.full(len(graph), 10)
    names = {graph.name(task): task for task in range(len(graph))}
    left = [name for name in names if "/0+8@8" in name]
    right = [name for name in names if "/8+8@8" in name]
    text = f"any: {left[0]} | {' '.join(left[1:])}\nany: | {' '.join(right)}"
    start, _ = run(graph, text, Costs(duration))
    assert start[names[right[0]]] == 10


def test_what_would_wait_for_ever_is_an_error():
    graph = one_chunk()
    text = "any: " + " ".join(graph.name(task) for task in (0, 2, 1, 3, 4))
    with pytest.raises(ScheduleError, match="for ever"):
        run(graph, text, Costs(np.array(ONE)))


@pytest.mark.parametrize(
    ("workers", "duration", "bound"),
    [
        (("npu", "cpu"), ONE, (150, "critical path")),
        (("any", "any"), ONE, (150, "critical path")),
        (("any",), ONE, (150, "work of all workers")),
    ],
)
def test_lower_bound_of_a_chain(workers, duration, bound):
    assert lower_bound_ns(one_chunk(), workers, Costs(np.array(duration))) == bound


def test_lower_bound_is_a_devices_work_over_its_workers():
    graph = build(toys.split(2, rows(1, 8), static_device="npu"), cut(80, rows(1, 8)), "last", 2)
    on_cpu = np.array([device == "cpu" for device in graph.devices])[graph.call_of]
    costs = Costs(np.where(on_cpu, 1000, 1))
    attention = int(on_cpu.sum()) * 1000
    assert lower_bound_ns(graph, ("npu", "cpu"), costs) == (attention, "work of cpu")
    assert lower_bound_ns(graph, ("npu", "cpu", "cpu"), costs) == (attention // 2, "work of cpu")


@given(st.integers(1, 8), st.integers(1, 8))
def test_the_bound_does_not_know_of_buffers(num_chunks, in_flight):
    """Fewer buffers make a schedule longer, not its bound."""
    chunks = cut(8 * num_chunks, rows(1, 8))
    split = toys.split(2, rows(1, 8))
    graphs = [build(split, chunks, "last", lanes) for lanes in (1, in_flight)]
    bounds = [lower_bound_ns(graph, ("any",) * 3, toys.unit_costs(graph)) for graph in graphs]
    assert bounds[0] == bounds[1]


THOUSANDS = """
import sys
for absent in ("torch", "executorch", "doubleweave._native"):
    sys.modules[absent] = None
sys.path.insert(0, sys.argv[1])
import toys
from doubleweave.schedule.chunks import cut
from doubleweave.ir.split import rows
from doubleweave.schedule.makers import make
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import build
graph = build(toys.split(30, rows(1, 8), static_device="npu"), cut(8 * 4000, rows(1, 8)), "last", 8)
costs = toys.unit_costs(graph)
start, end = times(graph, make("out_of_order", graph, ("npu", "cpu"), costs), costs)
print(len(graph), int(end.max()))
"""


def test_thousands_of_chunks_without_torch_or_executorch(request):
    done = subprocess.run(
        [sys.executable, "-c", THOUSANDS, str(request.path.parents[1])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    tasks, makespan = map(int, done.stdout.split())
    assert tasks > 4000 * 60
    # 32 tasks a chunk on the NPU, 30 on the CPU: the NPU's are the longer work.
    assert makespan >= 4000 * 31 * 1000
