"""Compare two timelines task by task: a prediction and a measured run, or two schedules."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from doubleweave.errors import InputError
from doubleweave.tables import format_table
from doubleweave.timeline.timeline import Event, Timeline, kind_of


@dataclass(frozen=True)
class Kind:
    """The tasks of one kind of segment that are in both; their milliseconds in all, and the median |difference|."""

    kind: str
    tasks: int
    a_ms: float
    b_ms: float
    apart_ms: float


@dataclass(frozen=True)
class Pair:
    """A task ("call/chunk") of both, milliseconds."""

    task: str
    a_ms: float
    b_ms: float
    a_start_ms: float
    b_start_ms: float


@dataclass(frozen=True)
class Comparison:
    """Timelines A and B. `tasks` are in both, the most different first; `moved` counts those that ran on different
    workers, `reordered` those that ran behind different tasks of their workers."""

    a: str
    b: str
    a_makespan_ms: float
    b_makespan_ms: float
    kinds: tuple[Kind, ...]
    tasks: tuple[Pair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    moved: int
    reordered: int
    a_busy_ms: tuple[float, ...]
    b_busy_ms: tuple[float, ...]


def compare(a: Timeline, b: Timeline) -> Comparison:
    """Match the tasks by call and chunk. Raises InputError where the two have no task in common."""
    in_a, in_b = ({_name(event): event for event in timeline.events} for timeline in (a, b))
    both = [task for task in in_a if task in in_b]
    if not both:
        raise InputError(
            "trace: the two have no task in common; expected traces of the same program and prompt length"
        )
    pairs = [_pair(task, in_a[task], in_b[task]) for task in both]
    kinds: dict[str, list[Pair]] = {}
    for pair in pairs:
        kinds.setdefault(kind_of(in_a[pair.task].segment), []).append(pair)
    before_a, before_b = _before(a), _before(b)
    return Comparison(
        a=a.title,
        b=b.title,
        a_makespan_ms=a.makespan_s * 1e3,
        b_makespan_ms=b.makespan_s * 1e3,
        kinds=tuple(_kind(kind, found) for kind, found in kinds.items()),
        tasks=tuple(sorted(pairs, key=lambda pair: -abs(pair.a_ms - pair.b_ms))),
        only_a=tuple(task for task in in_a if task not in in_b),
        only_b=tuple(task for task in in_b if task not in in_a),
        moved=sum(in_a[task].worker != in_b[task].worker for task in both),
        reordered=sum(before_a[task] != before_b[task] for task in both),
        a_busy_ms=tuple(a.busy_s(worker) * 1e3 for worker in range(a.num_workers)),
        b_busy_ms=tuple(b.busy_s(worker) * 1e3 for worker in range(b.num_workers)),
    )


def _before(timeline: Timeline) -> Mapping[str, str | None]:
    """The task that each task's worker ran just before it."""
    latest: dict[int, str] = {}
    found: dict[str, str | None] = {}
    for event in timeline.events:
        found[_name(event)] = latest.get(event.worker)
        latest[event.worker] = _name(event)
    return found


def _name(event: Event) -> str:
    return f"{event.call}/{event.chunk}"


def _pair(task: str, a: Event, b: Event) -> Pair:
    return Pair(task, a.duration_ns / 1e6, b.duration_ns / 1e6, a.start_ns / 1e6, b.start_ns / 1e6)


def _kind(kind: str, found: Sequence[Pair]) -> Kind:
    apart_ms = statistics.median_high(abs(pair.a_ms - pair.b_ms) for pair in found)
    return Kind(kind, len(found), sum(p.a_ms for p in found), sum(p.b_ms for p in found), apart_ms)


def comparison_text(found: Comparison, limit: int = 15) -> str:
    """Makespans, kinds of segments, and the tasks that differ most."""
    lines = [
        f"A: {found.a}, {found.a_makespan_ms:.2f} ms",
        f"B: {found.b}, {found.b_makespan_ms:.2f} ms ({_ratio(found.a_makespan_ms, found.b_makespan_ms)} of A)",
        "",
    ]
    rows = [["segment", "tasks", "A ms", "B ms", "B/A", "median |A - B| ms"]]
    rows += [
        [k.kind, str(k.tasks), f"{k.a_ms:.2f}", f"{k.b_ms:.2f}", _ratio(k.a_ms, k.b_ms), f"{k.apart_ms:.4f}"]
        for k in found.kinds
    ]
    for worker, (a, b) in enumerate(zip_longest(found.a_busy_ms, found.b_busy_ms, fillvalue=0.0)):
        rows.append([f"worker {worker} busy", "", f"{a:.2f}", f"{b:.2f}", _ratio(a, b), ""])
    lines += [format_table(rows), ""]
    rows = [["the most different tasks", "A ms", "B ms", "A starts", "B starts"]]
    rows += [
        [t.task, f"{t.a_ms:.3f}", f"{t.b_ms:.3f}", f"{t.a_start_ms:.2f}", f"{t.b_start_ms:.2f}"]
        for t in found.tasks[:limit]
    ]
    lines.append(format_table(rows))
    lines.append(
        f"{len(found.tasks)} tasks in both; {found.moved} on another worker, {found.reordered} behind another task"
    )
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        if only:
            count = f"{len(only)} task{'s' if len(only) > 1 else ''}"
            lines.append(f"{count} in {name} alone: {', '.join(only[:5])}{' …' if len(only) > 5 else ''}")
    return "\n".join(lines)


def _ratio(a: float, b: float) -> str:
    return f"{b / a:.3f}" if a else "-"
