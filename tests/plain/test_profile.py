"""Profiles: a segment's time between, on and beyond measured points; the costs of a graph; what auto chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import InputError
from doubleweave.ir.split import FixedSizes, rows
from doubleweave.predict.estimate import Device
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.profile import Decision, Measured, Profile
from doubleweave.schedule.choice import Choice, Wish, default_choice
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.task_graph import build

TABLE = Measured((10, 20), (0, 100), ((1.0, 3.0), (2.0, 8.0)))


def time_us(rows_: float, cached: float) -> float:
    return float(TABLE.time_us(np.array([rows_], float), np.array([cached], float))[0])


@pytest.mark.parametrize(
    ("rows_", "cached", "us"),
    [
        (10, 0, 1.0),
        (20, 100, 8.0),
        (15, 0, 1.5),
        (10, 50, 2.0),
        (15, 50, 3.5),
        (30, 0, 3.0),
        (20, 200, 14.0),
        (0, 0, 0.0),
        (-100, 0, 0.0),
    ],
)
def test_measured_times_are_linear_between_and_beyond_points(rows_, cached, us):
    assert time_us(rows_, cached) == pytest.approx(us)


@given(st.floats(0, 100), st.floats(0, 1000))
def test_one_point_is_a_constant(rows_, cached):
    table = Measured((8,), (0,), ((5.0,),))
    assert table.time_us(np.array([rows_]), np.array([cached])).tolist() == [5.0]


def profile(**changes) -> Profile:
    """Blocks and the rest take 100 us a call, attention 1 us a row and 2 us a cached token."""
    flat = {1: Measured((1, 8), (0,), ((100.0,), (100.0,)))}
    attention = {1: Measured((0, 8), (0, 10), ((0.0, 20.0), (8.0, 28.0)))}
    names = [segment.name for segment in toys.split(2, rows(1, 8)).segments]
    segments = {name: attention if name == "attention" else flat for name in names}
    return replace(Profile("p", "measured", segments=segments), **changes)


def graph_of(num_tokens: int, shape=None):
    shape = shape or rows(1, 8)
    return build(toys.split(2, shape), cut(num_tokens, shape), "last", 2)


def test_a_repeated_call_takes_its_share_of_the_time_behind_so_many_tokens():
    attention = Measured((8,), (0, 16), ((8.0, 24.0),), repeated=(1.0, 0.5))
    graph = graph_of(24)
    costs = toys.costs(profile(segments={**profile().segments, "attention": {1: attention}}), graph)
    assert costs.repeated is not None
    for number, task in enumerate(graph.tasks):
        is_attention = "attention" in graph.split.calls[task.call].name
        assert costs.repeated[number] == ([1.0, 0.75, 0.5][task.chunk] if is_attention else 1.0)


def test_costs_place_each_chunk_behind_those_before_it():
    graph = graph_of(24)
    for cached in (0, 100):
        costs = toys.costs(profile(), graph, cached=cached)
        for number, task in enumerate(graph.tasks):
            want = 100.0
            if "attention" in graph.split.calls[task.call].name:
                want = 8.0 + 2 * (cached + 8 * task.chunk)
            assert costs.duration_ns[number] == want * 1000


def test_static_segments_cost_their_compiled_size_and_the_head_one_row():
    shape = FixedSizes((1, 8))
    graph = graph_of(5, shape)
    growing = {1: Measured((0, 8), (0,), ((0.0,), (8.0,)))}
    names = [segment.name for segment in graph.split.segments]
    found = toys.costs(Profile("p", "measured", segments=dict.fromkeys(names, growing)), graph)
    by_name = {graph.name(task).partition("/")[0]: found.duration_ns[task] for task in range(len(graph))}
    assert by_name["block_0"] == 8000
    assert by_name["attention_0"] == 5000
    assert by_name["lm_head"] == 1000
    every = toys.costs(Profile("p", "measured", segments=dict.fromkeys(names, growing)), graph, all_rows=True)
    assert every.duration_ns[len(graph) - 1] == 8000


def test_the_nearest_number_of_threads_and_of_workers_counts():
    segments = {
        name: {1: Measured((1,), (0,), ((100.0,),)), 4: Measured((1,), (0,), ((30.0,),))}
        for name in profile().segments
    }
    found = profile(segments=segments, contention={2: {("cpu", "cpu"): 0.1}, 8: {("cpu", "cpu"): 0.8}})
    graph = graph_of(8)
    assert {toys.costs(found, graph, threads).duration_ns[0] for threads in (1, 2)} == {100_000}
    assert {toys.costs(found, graph, threads).duration_ns[0] for threads in (3, 4, 9)} == {30_000}
    shares = [toys.costs(found, graph, 1, workers).contention["cpu", "cpu"] for workers in (1, 2, 4, 6, 20)]
    assert shares == [0.1, 0.1, 0.1, 0.8, 0.8]
    assert toys.costs(profile(), graph, 1, 2).contention == {}


def test_what_is_not_measured_is_estimated_from_its_device():
    cpu = Device(launch_us=3.0, hand_over_us=9.0, bandwidth_gb_s=1e9, peak_gops={"float32": 1e12})
    found = toys.costs(Profile("p", "estimate", devices={"cpu": cpu}), graph_of(8))
    assert (found.duration_ns == 3000).all()
    assert found.hand_over_ns["cpu", "cpu"] == 9000


def test_neither_measured_nor_a_device():
    with pytest.raises(
        InputError, match="found neither segment 'embed_tokens' nor device 'cpu', expected one of them"
    ):
        toys.costs(Profile("p", "estimate"), graph_of(8))


def choose(found: Profile, split, num_tokens: int, threads: int) -> Choice:
    return RunPlanner(split, found, 4096).choose(Wish(threads=threads), num_tokens)


def test_auto_looks_decisions_up_by_length():
    one, other = (Choice("sequential", ("any",), 2, 8, 1), Choice("wavefront", ("any", "any"), 1, 8, 4, 2))
    found = profile(threads=2, decisions=(Decision(10, one, 0.1), Decision(50, other, 0.2)))
    split = toys.split(2, rows(1, 8))
    assert [choose(found, split, tokens, 2) for tokens in (1, 10, 11, 50, 4000)] == [
        one,
        one,
        other,
        other,
        other,
    ]


def test_auto_without_decisions_for_so_many_threads_goes_by_a_rule():
    split = toys.split(2, rows(1, 8))
    found = profile(threads=2, decisions=(Decision(10, Choice("lockstep", ("cpu", "cpu"), 1, 8, 2), 0.1),))
    assert choose(found, split, 4, 4) == default_choice(split, "sequential", 4)
    assert choose(found, split, 5, 4) == default_choice(split, "wavefront", 4)
    assert choose(found, split, 500, 1) == default_choice(split, "sequential", 1)


def test_without_decisions_a_real_npu_runs_out_of_order_and_its_stand_in_as_a_wavefront():
    split = toys.split(2, FixedSizes((1, 8)), static_device="npu")
    plain = profile()
    assert choose(plain, split, 100, 2).schedule == "wavefront"
    on_npu = replace(
        split,
        segments=tuple(
            replace(s, backend="qnn") if s.name.startswith("block") else s for s in split.segments
        ),
    )
    choice = choose(plain, on_npu, 100, 2)
    assert (choice.schedule, set(choice.workers)) == ("out_of_order", {"npu", "cpu"})
