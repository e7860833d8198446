"""Random splits, task graphs, workers and costs, for properties of schedules. Needs neither torch nor ExecuTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from doubleweave.ir.split import Call, FixedSizes, Function, Port, Segment, Split, Value, rows
from doubleweave.schedule.chunks import Chunk
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.schedule import BARRIER, Schedule
from doubleweave.schedule.task_graph import TaskGraph, build

DEVICES = ("npu", "cpu", "gpu")
_ROW = ("float32", (1, "T", 4))


@st.composite
def splits(draw: Any) -> Split:
    """A few calls in a row that read what earlier ones wrote, some appending to caches, some reading them, some of a
    segment that was called before, on up to three devices; the last call gives the output."""
    devices = DEVICES[: draw(st.integers(1, 3))]
    values = [Value("input_ids", "int64", (1, "T"), "input")]
    calls: list[Call] = []
    segments: dict[str, Segment] = {}
    local, caches = ["input_ids"], []
    count = draw(st.integers(2, 9))
    for index in range(count):
        is_last = index == count - 1
        reads = draw(st.lists(st.sampled_from(local[-3:]), min_size=1, max_size=2, unique=True))
        seen = draw(st.lists(st.sampled_from(caches), max_size=2, unique=True)) if caches else []
        appends = not is_last and draw(st.booleans())
        gives = not appends or draw(st.booleans())
        writes = ([f"value_{index}"] if gives else []) + ([f"cache_{index}"] if appends else [])
        kinds = (["output" if is_last else "chunk"] if gives else []) + (["cache"] if appends else [])
        values += [Value(name, *_ROW, kind) for name, kind in zip(writes, kinds, strict=True)]
        segment = Segment(
            name=f"segment_{index}",
            device=draw(st.sampled_from(devices)),
            backend="xnnpack",
            shape=draw(st.sampled_from([rows(1, 8), FixedSizes((1, 4, 8))])),
            inputs=tuple(
                Port(f"in{i}", "float32", (1, "S" if name in caches else "T", 4))
                for i, name in enumerate([*reads, *seen])
            ),
            outputs=tuple(Port(f"out{i}", *_ROW) for i in range(len(writes))),
            structure="s",
            weight_bytes=draw(st.sampled_from([0, 64])),
            num_operators=1,
            num_delegated=draw(st.integers(0, 1)),
        )
        # A segment may be called again where it takes as many values.
        twins = [
            s
            for s in segments.values()
            if (len(s.inputs), len(s.outputs)) == (len(segment.inputs), len(writes))
        ]
        if twins and draw(st.booleans()):
            segment = draw(st.sampled_from(twins))
        segments[segment.name] = segment
        calls.append(Call(f"call_{index}", segment.name, (*reads, *seen), tuple(writes)))
        local += [name for name, kind in zip(writes, kinds, strict=True) if kind == "chunk"]
        caches += [name for name, kind in zip(writes, kinds, strict=True) if kind == "cache"]
    if not caches:  # something has to be appended, as in any language model
        values.append(Value("cache_0", *_ROW, "cache"))
        first = calls[0]
        calls[0] = Call(first.name, first.segment, first.reads, (*first.writes, "cache_0"))
    return Split(
        tuple(segments.values()), (Function("", tuple(calls), tuple(values), (f"value_{count - 1}",)),)
    )


class Case(NamedTuple):
    graph: TaskGraph
    workers: tuple[str, ...]
    costs: Costs


@st.composite
def cases(draw: Any, *, free: bool = True) -> Case:
    """A graph, workers for each of its devices and random costs; `free`: no hand-overs and no contention."""
    split = draw(splits())
    sizes = draw(st.lists(st.sampled_from([1, 4, 8]), min_size=1, max_size=7))
    starts = np.cumsum([0, *sizes]).tolist()
    chunks = tuple(Chunk(start, size, size) for start, size in zip(starts, sizes, strict=False))
    graph = build(split, chunks, draw(st.sampled_from(["last", "all"])), draw(st.integers(1, 8)))
    devices = sorted(set(graph.devices))
    if draw(st.booleans()):
        workers = ("any",) * draw(st.integers(1, 4))
    else:
        workers = tuple(device for device in devices for _ in range(draw(st.integers(1, 2))))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    duration = random.integers(0, 10_000, len(graph))
    if free:
        return Case(graph, workers, Costs(duration))
    pairs = [(a, b) for a in devices for b in devices]
    hand_over = {pair: int(random.integers(0, 500)) for pair in pairs}
    contention = {pair: float(random.random()) for pair in pairs}
    return Case(graph, workers, Costs(duration, hand_over, int(random.integers(0, 50)), contention))


def mutate(schedule: Schedule, graph: TaskGraph, random: Any) -> Schedule:
    """One to three random changes: most make the schedule illegal, some do not."""
    workers = [list(tasks) for tasks in schedule.workers]
    for _ in range(random.randint(1, 3)):
        filled = [tasks for tasks in workers if tasks]
        if not filled:
            break
        tasks, others = random.choice(filled), random.choice(workers)
        place = random.randrange(len(tasks))
        change = random.choice(["drop", "double", "move", "swap", "stop", "reverse"])
        if change == "drop":
            del tasks[place]
        elif change == "double":
            others.insert(random.randint(0, len(others)), tasks[place])
        elif change == "move":
            task = tasks.pop(place)
            others.insert(random.randint(0, len(others)), task)
        elif change == "swap":
            other = random.randrange(len(tasks))
            tasks[place], tasks[other] = tasks[other], tasks[place]
        elif change == "stop":
            others.insert(random.randint(0, len(others)), BARRIER)
        else:
            tasks[place:] = reversed(tasks[place:])
    return Schedule("mutated", schedule.devices, tuple(map(tuple, workers)), schedule.threads)
