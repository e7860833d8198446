"""The task graph: nothing missing, nothing superfluous, and no buffer overwritten before it was read."""

from __future__ import annotations

from graphlib import TopologicalSorter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.ir.split import FixedSizes, rows
from doubleweave.schedule.choice import default_choice, graph_of
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import MAKERS, make
from doubleweave.schedule.pattern import has_instance_per_worker, needed
from doubleweave.schedule.task_graph import Task, TaskGraph, build


@st.composite
def graphs(draw) -> TaskGraph:
    shape = draw(st.sampled_from([rows(1, 8), FixedSizes((1, 4, 8)), FixedSizes((8,))]))
    split = toys.split(draw(st.integers(1, 3)), shape)
    chunks = cut(draw(st.integers(1, 40)), shape, draw(st.integers(1, 3)))
    return build(split, chunks, draw(st.sampled_from(["last", "all"])), draw(st.integers(1, 4)))


def before(graph: TaskGraph) -> list[set[int]]:
    """All tasks that have ended when a task starts, whatever the order of the others."""
    result: dict[int, set[int]] = {}
    for number in TopologicalSorter(dict(enumerate(graph.after))).static_order():
        after = graph.after[number]
        result[number] = set(after).union(*(result[earlier] for earlier in after))
    return [result[number] for number in range(len(graph.tasks))]


def users(graph: TaskGraph) -> dict[tuple[str, int], list[int]]:
    """For each (value, chunk) the tasks that touch it, its writer first."""
    found: dict[tuple[str, int], list[int]] = {}
    for number, task in enumerate(graph.tasks):
        call = graph.split.calls[task.call]
        for name in (*call.writes, *call.reads):
            found.setdefault((name, task.chunk), []).append(number)
    return found


def buffers(graph: TaskGraph) -> dict[tuple[str, int], int]:
    """The buffer of each (value, chunk) that a task writes; caches have none."""
    kinds = {value.name: value.kind for value in graph.split.values}
    return {
        (name, chunk): graph.buffer(name, chunk)
        for (name, chunk) in users(graph)
        if kinds[name] in ("chunk", "output")
    }


@pytest.mark.parametrize("num_chunks", [1, 2, 5])
def test_last_block_and_head_run_for_the_last_chunk_alone(num_chunks):
    split = toys.split(2, rows(1, 8))
    graph = build(split, cut(8 * num_chunks, rows(1, 8)), "last")
    chunks_of = {
        name: [t.chunk for t in graph.tasks if split.calls[t.call].name == name]
        for name in ("block_1", "attention_1", "block_2", "lm_head")
    }
    every, last = list(range(num_chunks)), [num_chunks - 1]
    assert chunks_of == {"block_1": every, "attention_1": last, "block_2": last, "lm_head": last}
    assert len(graph) == len(graph.tasks) == len(set(graph.tasks))


@given(graphs())
def test_asking_for_every_row_needs_every_call(graph):
    every = tuple(range(len(graph.split.calls)))
    assert needed(graph.split, "all") == (every, every)
    body, last = needed(graph.split, "last")
    assert set(body) < set(last) == set(every)


@given(graphs())
def test_every_task_waits_for_all_that_it_reads(graph):
    writer = graph.split.writer()
    kinds = {value.name: value.kind for value in graph.split.values}
    index = {task: number for number, task in enumerate(graph.tasks)}
    ended = before(graph)
    for number, task in enumerate(graph.tasks):
        for name in graph.split.calls[task.call].reads:
            if kinds[name] == "input":
                continue
            chunks = range(task.chunk + 1) if kinds[name] == "cache" else [task.chunk]
            assert {index[Task(writer[name], chunk)] for chunk in chunks} <= ended[number]


@given(graphs())
def test_values_that_share_a_buffer_never_live_at_once(graph):
    ended, touched = before(graph), users(graph)
    by_buffer: dict[int, list[tuple[str, int]]] = {}
    for value, buffer in buffers(graph).items():
        by_buffer.setdefault(buffer, []).append(value)
    for sharing in by_buffer.values():
        sharing.sort(key=lambda value: touched[value][0])
        for earlier, later in pairwise(sharing):
            assert set(touched[earlier]) <= ended[touched[later][0]]


@given(graphs(), st.randoms(use_true_random=False))
def test_no_reader_sees_overwritten_data_in_any_order(graph, random):
    kinds, numbers = {value.name: value.kind for value in graph.split.values}, buffers(graph)
    waiting = {number: set(after) for number, after in enumerate(graph.after)}
    holds: dict[int, tuple[str, int]] = {}
    while waiting:
        number = random.choice([n for n, after in waiting.items() if not after])
        task = graph.tasks[number]
        call = graph.split.calls[task.call]
        for name in call.reads:
            if kinds[name] == "chunk":
                assert holds[numbers[name, task.chunk]] == (name, task.chunk)
        for name in call.writes:
            if kinds[name] != "cache":
                holds[numbers[name, task.chunk]] = (name, task.chunk)
        del waiting[number]
        for after in waiting.values():
            after.discard(number)
    outputs = [value for value in numbers if kinds[value[0]] == "output"]
    assert outputs
    assert all(holds[numbers[value]] == value for value in outputs)


@given(graphs())
def test_buffers_hold_every_row_that_is_computed(graph):
    row_bytes = {value.name: value.row_bytes for value in graph.split.values}
    writer = graph.split.writer()
    for (name, chunk), buffer in buffers(graph).items():
        last_only = graph.split.calls[writer[name]].rows == "last" and graph.want == "last"
        rows = 1 if last_only else graph.chunks[chunk].compiled_size
        assert graph.buffer_bytes[buffer] >= row_bytes[name] * rows


@given(graphs())
def test_a_shared_instance_runs_one_task_at_a_time(graph):
    ended = before(graph)
    by_segment: dict[str, list[int]] = {}
    for number, task in enumerate(graph.tasks):
        if not has_instance_per_worker(graph.split, task.call):
            by_segment.setdefault(graph.split.calls[task.call].segment, []).append(number)
    for numbers in by_segment.values():
        for earlier, later in pairwise(numbers):
            assert earlier in ended[later]


def test_chunks_in_flight_cost_memory_and_a_single_one_reuses_it():
    split, chunks = toys.split(3, rows(1, 8)), cut(64, rows(1, 8))
    sizes = [sum(build(split, chunks, "last", in_flight).buffer_bytes) for in_flight in (1, 2, 4)]
    assert sizes == sorted(set(sizes))
    longer = build(split, cut(128, rows(1, 8)), "last", 1)
    assert sum(longer.buffer_bytes) == sizes[0]


@pytest.mark.parametrize("schedule", sorted(MAKERS))
def test_a_plan_grows_with_its_chunks_alone(schedule):
    """131,072 tokens in 4,096 chunks: a chunk costs as many tasks, dependencies and places wherever it stands, and no
    buffer more."""
    split = toys.split(3, rows(1, 32))
    choice = default_choice(split, schedule, 2)

    def size(num_chunks):
        graph = graph_of(split, choice, cut(32 * num_chunks, rows(1, 32)), "last")
        made = make(schedule, graph, choice.workers, toys.unit_costs(graph), choice.threads)
        return np.array([len(graph), len(graph.after_list), len(graph.buffer_bytes), *map(len, made.workers)])

    small, middle, large = size(1024), size(2048), size(4096)
    assert (np.abs((large - middle) - 2 * (middle - small)) <= 2).all()  # where the last chunks differ
    assert small[2] == large[2]
