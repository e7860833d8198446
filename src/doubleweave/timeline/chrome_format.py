"""Timelines as Chrome trace events (ui.perfetto.dev and chrome://tracing open them), and back.

Times are in microseconds there, as the format wants, with nanoseconds behind the point. It knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doubleweave.errors import InputError
from doubleweave.schedule.chunks import Chunk
from doubleweave.timeline.timeline import Counter, Event, Timeline, kind_of

# Names of colours that trace viewers know, chosen to be told apart beside each other.
_COLOURS = (
    "thread_state_running",
    "rail_animation",
    "thread_state_iowait",
    "rail_load",
    "thread_state_runnable",
    "rail_response",
    "cq_build_passed",
    "rail_idle",
)
_FORMAT = "doubleweave timeline 1"
_MOST_WORKERS = 2**16


def to_chrome(timeline: Timeline) -> dict[str, Any]:
    """One track a worker, one slice a task in its chunk's colour, arrows for hand-overs, counters."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": timeline.title or "doubleweave"}}
    ]
    for worker in range(timeline.num_workers):
        device = f" {timeline.devices[worker]}" if timeline.devices else ""
        name = f"worker {worker}{device}"
        events.append({"ph": "M", "pid": 0, "tid": worker, "name": "thread_name", "args": {"name": name}})
    events += [_slice(event, timeline) for event in timeline.events]
    for number, (earlier, later) in enumerate(timeline.links):
        source, target = timeline.events[earlier], timeline.events[later]
        common = {"pid": 0, "cat": "hand-over", "name": "hand-over", "id": number}
        events.append({"ph": "s", "tid": source.worker, "ts": source.end_ns / 1e3, **common})
        events.append({"ph": "f", "bp": "e", "tid": target.worker, "ts": target.start_ns / 1e3, **common})
    for counter in timeline.counters:
        name = f"{counter.name} ({counter.unit})"
        events += [
            {"ph": "C", "pid": 0, "name": name, "ts": at / 1e3, "args": {counter.unit: value}}
            for at, value in counter.samples
        ]
    about = {
        "format": _FORMAT,
        "title": timeline.title,
        "num_workers": timeline.num_workers,
        "devices": list(timeline.devices),
        "chunks": [list(chunk) for chunk in timeline.chunks],
        "links": [list(link) for link in timeline.links],
        "counters": [[counter.name, counter.unit] for counter in timeline.counters],
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _slice(event: Event, timeline: Timeline) -> dict[str, Any]:
    arguments: dict[str, Any] = {"segment": event.segment, "device": event.device, "chunk": event.chunk}
    if event.chunk < len(timeline.chunks):
        start, tokens, size = timeline.chunks[event.chunk]
        arguments |= {"first_token": start, "tokens": tokens, "compiled_size": size}
    return {
        "ph": "X",
        "pid": 0,
        "tid": event.worker,
        "name": f"{event.call}/{event.chunk}",
        "cat": kind_of(event.segment),
        "ts": event.start_ns / 1e3,
        "dur": event.duration_ns / 1e3,
        "cname": _COLOURS[event.chunk % len(_COLOURS)],
        "args": arguments,
    }


def from_chrome(data: Any, where: str) -> Timeline:
    """Read the data of `to_chrome` back; raises InputError for anything else."""
    about = data.get("otherData") if isinstance(data, Mapping) else None
    if not isinstance(about, Mapping) or about.get("format") != _FORMAT:
        raise InputError(f"{where}: is no trace of doubleweave; expected a file that --trace FILE.json wrote")
    try:
        events = tuple(_event(event) for event in data["traceEvents"] if event["ph"] == "X")
        num_workers = int(about["num_workers"])
        if not 0 <= max((event.worker for event in events), default=0) < num_workers <= _MOST_WORKERS:
            raise ValueError(f"{num_workers} workers are not those of its tasks")
        return Timeline(
            events=events,
            num_workers=num_workers,
            devices=tuple(map(str, about["devices"])),
            chunks=tuple(Chunk(*map(int, chunk)) for chunk in about["chunks"]),
            links=tuple((int(a), int(b)) for a, b in about["links"]),
            counters=tuple(
                Counter(name, unit, _samples(data["traceEvents"], name, unit))
                for name, unit in about["counters"]
            ),
            title=str(about["title"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # JSON gives whatever the file has
        reason = ascii(str(error))[1:-1][:300]
        raise InputError(f"{where}: is a damaged trace ({type(error).__name__}: {reason})") from None


def _event(item: Mapping[str, Any]) -> Event:
    call, _, _ = str(item["name"]).rpartition("/")
    arguments, start = item["args"], round(item["ts"] * 1e3)
    segment, device, chunk = str(arguments["segment"]), str(arguments["device"]), int(arguments["chunk"])
    return Event(call, segment, device, chunk, int(item["tid"]), start, start + round(item["dur"] * 1e3))


def _samples(events: list[Any], name: str, unit: str) -> tuple[tuple[int, float], ...]:
    shown = f"{name} ({unit})"
    return tuple(
        (round(event["ts"] * 1e3), float(event["args"][unit]))
        for event in events
        if event["ph"] == "C" and event["name"] == shown
    )
