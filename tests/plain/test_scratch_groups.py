"""Scratch memory: blocks share it in groups, and the pipeline keeps chunks from meeting in one."""

from __future__ import annotations

from graphlib import TopologicalSorter
from itertools import combinations, pairwise

import pytest

import toys
from doubleweave.ir.split import rows
from doubleweave.schedule import scratch_groups
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import make
from doubleweave.schedule.task_graph import TaskGraph, build
from doubleweave.schedule.verify import verify


def ended_before(graph: TaskGraph, workers: tuple[tuple[int, ...], ...]) -> list[set[int]]:
    """What has surely ended when each task starts: what it waits for, and what its worker did before."""
    edges = {number: set(after) for number, after in enumerate(graph.after)}
    for tasks in workers:
        for earlier, later in pairwise(tasks):
            edges[later].add(earlier)
    result: dict[int, set[int]] = {}
    for number in TopologicalSorter(edges).static_order():
        result[number] = edges[number].union(*(result[earlier] for earlier in edges[number]))
    return [result[number] for number in range(len(graph.tasks))]


@pytest.mark.parametrize("num_layers", [10, 12])
@pytest.mark.parametrize("num_chunks", [2, 5, 6])
def test_two_workers_never_meet_in_a_group(num_layers, num_chunks):
    split = toys.split(num_layers, rows(1, 8))
    groups = scratch_groups.groups(split)
    assert num_layers % scratch_groups.num_groups(split) == 0
    graph = build(split, cut(8 * num_chunks, rows(1, 8)), "last", 2, abreast=2)
    verified = verify(make("wavefront", graph, ("any", "any"), toys.unit_costs(graph)), graph)
    ended = ended_before(graph, verified.workers)
    by_group: dict[int, list[int]] = {}
    for number, task in enumerate(graph.tasks):
        if (group := groups.get(split.calls[task.call].segment)) is not None:
            by_group.setdefault(group, []).append(number)
    assert len(by_group) == scratch_groups.num_groups(split)
    for tasks in by_group.values():
        for a, b in combinations(tasks, 2):
            assert a in ended[b] or b in ended[a], (graph.name(a), graph.name(b))


@pytest.mark.parametrize("num_layers", [1, 2, 5, 7, 11, 30, 32])
def test_neighbours_are_in_different_groups(num_layers):
    split = toys.split(num_layers, rows(1, 8))
    groups = scratch_groups.groups(split)
    assert len(groups) == num_layers
    numbers = [groups[split.calls[call].segment] for call in scratch_groups.blocks(split)]
    assert all(a != b for a, b in pairwise(numbers))
    assert set(numbers) == set(range(scratch_groups.num_groups(split)))
