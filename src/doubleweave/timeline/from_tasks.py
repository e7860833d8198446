"""The timeline of a task graph's run, measured or simulated: events, hand-overs, and the bytes in use.

It knows nothing of where the times come from.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from doubleweave.schedule.costs import Int64Array
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import TaskGraph
from doubleweave.timeline.timeline import Counter, Event, Timeline


def timeline_of(
    graph: TaskGraph,
    schedule: Schedule,
    start_ns: Int64Array,
    end_ns: Int64Array,
    title: str = "",
    cached: int = 0,
) -> Timeline:
    """The timeline of a run in which task t ran from `start_ns[t]` to `end_ns[t]`, behind `cached` tokens."""
    calls, worker_of = graph.split.calls, schedule.worker_of
    # Tasks that start together keep the graph's order, so that a picture is the same every time.
    order = np.lexsort((np.arange(len(graph)), start_ns)).tolist()
    place = {task: index for index, task in enumerate(order)}
    starts, ends = start_ns.tolist(), end_ns.tolist()
    call_of, chunk_of = graph.call_of.tolist(), graph.chunk_of.tolist()
    events = []
    for task in order:
        call, where = calls[call_of[task]], (graph.device_of[task], chunk_of[task], worker_of[task])
        events.append(Event(call.name, call.segment, *where, starts[task], ends[task]))
    links = tuple(
        (place[before], place[task])
        for task in order
        for before in graph.after[task]
        if worker_of[before] != worker_of[task] and _reads(graph, task, before)
    )
    counters = _counters(graph, ends, starts, cached)
    workers = schedule.devices
    return Timeline(tuple(events), len(workers), workers, graph.chunks, links, counters, title)


def _reads(graph: TaskGraph, task: int, before: int) -> bool:
    calls = graph.split.calls
    return bool(set(calls[graph.call_of[task]].reads) & set(calls[graph.call_of[before]].writes))


def _counters(graph: TaskGraph, ends: list[int], starts: list[int], cached: int) -> tuple[Counter, ...]:
    """Bytes of keys and values, growing as tasks that append end; bytes of buffers between their writer's start and
    their last reader's end."""
    values = {value.name: value for value in graph.split.values}
    cache_row = sum(value.row_bytes for value in values.values() if value.kind == "cache")
    growth = [(0, float(cached * cache_row))]
    spans: dict[tuple[str, int], list[int]] = {}
    call_of, chunk_of = graph.call_of.tolist(), graph.chunk_of.tolist()
    for task, (call_index, chunk) in enumerate(zip(call_of, chunk_of, strict=True)):
        call = graph.split.calls[call_index]
        rows = graph.chunks[chunk].num_tokens
        appended = sum(values[name].row_bytes for name in call.writes if values[name].kind == "cache")
        if appended:
            growth.append((ends[task], float(appended * rows)))
        for name in call.writes:
            if values[name].kind == "chunk":
                spans[name, chunk] = [starts[task], ends[task], values[name].row_bytes * rows]
        for name in call.reads:
            if (name, chunk) in spans:
                spans[name, chunk][1] = max(spans[name, chunk][1], ends[task])
    flows = [(begin, float(size)) for begin, _, size in spans.values()]
    flows += [(end, -float(size)) for _, end, size in spans.values()]
    named = (("KV cache", growth), ("buffers in flight", flows))
    return tuple(Counter(name, "bytes", _sums(changes)) for name, changes in named)


def _sums(changes: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Running totals of (time, change) pairs, one for each time."""
    changes = sorted(changes)
    totals = accumulate(change for _, change in changes)
    return tuple({at: total for (at, _), total in zip(changes, totals, strict=True)}.items())
