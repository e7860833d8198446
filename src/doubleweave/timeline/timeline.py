"""Timelines: when each task of a run ran, and on which worker; and their text form. No torch, no ExecuTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from doubleweave.schedule.chunks import Chunk
from doubleweave.tables import format_table


class Event(NamedTuple):
    """A task that ran; times in nanoseconds since the run's start."""

    call: str
    segment: str
    device: str
    chunk: int
    worker: int
    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class Counter(NamedTuple):
    """A quantity over time: (nanoseconds, value) in order of time."""

    name: str
    unit: str
    samples: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Timeline:
    """The events of one run, in order of their start.

    `devices` are those of the workers; `Event.chunk` is a place in `chunks`. `links` are hand-overs, as places in
    `events`: the second task reads, on another worker, a value that the first wrote. A field that is not known is
    empty.
    """

    events: tuple[Event, ...]
    num_workers: int
    devices: tuple[str, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    links: tuple[tuple[int, int], ...] = ()
    counters: tuple[Counter, ...] = ()
    title: str = ""

    @property
    def makespan_s(self) -> float:
        return max((event.end_ns for event in self.events), default=0) / 1e9

    def busy_s(self, worker: int) -> float:
        return sum(e.duration_ns for e in self.events if e.worker == worker) / 1e9

    def gantt(self, width: int = 72) -> str:
        """One row a worker, time from left to right, with a legend.

        Static segments show as the chunk's digit, attention as a letter (a for chunk 0, b for 1, …), idle
        time as a dot.
        """
        if not self.events:
            return "(nothing ran)"
        end = max(event.end_ns for event in self.events)
        lines = []
        for worker in range(self.num_workers):
            cells: list[dict[str, int]] = [{} for _ in range(width)]
            for event in (e for e in self.events if e.worker == worker):
                _add(cells, event, end / width)
            row = "".join(
                max(cell, key=cell.__getitem__) if sum(cell.values()) * 2 * width >= end else "."
                for cell in cells
            )
            lines.append(f"{self._label(worker)} |{row}|")
        margin = " " * (len(self._label(0)) + 1)
        lines.append(f"{margin}0{'':{max(1, width - 9)}}{end / 1e6:>8.1f} ms")
        lines.append(f"{margin}digit: chunk, in static segments; letter: chunk, in attention; dot: waiting")
        return "\n".join(lines)

    def _label(self, worker: int) -> str:
        widest = max(map(len, self.devices), default=0)
        return f"worker {worker}" + (f" {self.devices[worker]:<{widest}}" if self.devices else "")

    def table(self) -> str:
        """Busy time by kind of segment and worker."""
        kinds: dict[str, list[list[int]]] = {}
        for event in self.events:
            of_workers = kinds.setdefault(kind_of(event.segment), [[] for _ in range(self.num_workers)])
            of_workers[event.worker].append(event.duration_ns)
        head = ["segment", "runs", *(f"worker {w} ms" for w in range(self.num_workers))]
        rows = [
            [kind, str(sum(map(len, found))), *(f"{sum(took) / 1e6:.1f}" for took in found)]
            for kind, found in kinds.items()
        ]
        busy = [f"{self.busy_s(w) / self.makespan_s:.0%}" for w in range(self.num_workers) if self.events]
        return format_table([head, *rows, ["busy share", "", *busy]])


def kind_of(segment: str) -> str:
    """The kind of a segment: "block_*" for all that differ in their number alone."""
    stem, _, number = segment.rpartition("_")
    return f"{stem}_*" if number.isdigit() else segment


def _add(cells: list[dict[str, int]], event: Event, cell_ns: float) -> None:
    """Add the event's nanoseconds to the cells it covers."""
    first, last = (min(len(cells) - 1, int(t / cell_ns)) for t in (event.start_ns, event.end_ns))
    for number in range(first, last + 1):
        covered = min(event.end_ns, (number + 1) * cell_ns) - max(event.start_ns, number * cell_ns)
        cell = cells[number]
        cell[_mark(event)] = cell.get(_mark(event), 0) + max(0, round(covered))


def _mark(event: Event) -> str:
    if event.segment.startswith("attention"):
        return "abcdefghijklmnopqrstuvwxyz"[event.chunk % 26]
    return str(event.chunk % 10)
