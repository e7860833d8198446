"""Choose how a prompt is run: simulate the candidates on a profile and take the fastest. No torch, no ExecuTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from doubleweave.errors import InputError
from doubleweave.ir.split import FixedSizes, Split, most_rows
from doubleweave.predict.profile import Decision, Profile
from doubleweave.schedule.choice import Choice, chunk_shape, chunks_of, default_choice, graph_of
from doubleweave.schedule.costs import lower_bound_ns
from doubleweave.schedule.makers import MAKERS, make
from doubleweave.schedule.schedule import ANY, Schedule
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import TaskGraph

# A candidate must promise this much more than a simpler one to be taken.
_WORTH = 0.01
_LENGTHS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    8192,
)


class Run(NamedTuple):
    """A choice's graph, schedule and simulated times."""

    choice: Choice
    graph: TaskGraph
    schedule: Schedule
    start_ns: Any
    end_ns: Any


@dataclass(frozen=True)
class Forecast:
    """What a choice promises. `bound` says what limits it, `bottleneck` the device that is busy for the largest share
    of the time; `hidden` is the share of the CPU's time during which another worker was busy too."""

    schedule: str
    workers: tuple[str, ...]
    threads: int
    chunk: int
    in_flight: int
    abreast: int
    chunks: tuple[tuple[int, int, int], ...]
    makespan_s: float
    lower_bound_s: float
    overlap_efficiency: float
    bound: str
    bottleneck: str
    busy_s: tuple[float, ...]
    hidden: float
    buffer_bytes: int


@dataclass(frozen=True)
class Plan:
    """The candidates for one prompt length, fastest first; `chosen` is the simplest of those within 1% of it."""

    num_tokens: int
    chosen: Forecast
    candidates: tuple[Forecast, ...]


def simulate(split: Split, choice: Choice, num_tokens: int, profile: Profile) -> Run:
    """Run a prompt on a profile. Raises ScheduleError or InputError where schedule, workers or profile do not fit."""
    for device, count in _too_many(split, choice, profile).items():
        raise InputError(
            f"workers: found {count} that run tasks of device {device!r}, expected at most "
            f"{profile.devices[device].workers} (as many run on it at once on {profile.name})"
        )
    graph = graph_of(split, choice, chunks_of(split, choice, num_tokens), "last")
    costs = profile.costs(graph, choice.threads, len(choice.workers))
    schedule = make(choice.schedule, graph, choice.workers, costs, choice.threads)
    return Run(choice, graph, schedule, *times(graph, schedule, costs))


def _too_many(split: Split, choice: Choice, profile: Profile) -> dict[str, int]:
    """The devices that run fewer tasks at once than workers would give them, and how many those are."""
    counts = {
        device: sum(worker in (device, ANY) for worker in choice.workers)
        for device in {segment.device for segment in split.segments} & set(profile.devices)
    }
    return {
        device: count
        for device, count in counts.items()
        if count > (profile.devices[device].workers or count)
    }


def forecast(run: Run, profile: Profile) -> Forecast:
    """Sum a simulated run up."""
    graph, schedule = run.graph, run.schedule
    bound_ns, bound = lower_bound_ns(graph, schedule.devices, profile.costs(graph, run.choice.threads))
    makespan_ns = int(run.end_ns.max())
    took = run.end_ns - run.start_ns
    busy = tuple(float(took[[t for t in tasks if t >= 0]].sum()) / 1e9 for tasks in schedule.workers)
    devices = np.array(graph.devices)[graph.call_of]
    shares = {}
    for device in sorted(set(graph.devices)):
        count = sum(of in (device, ANY) for of in schedule.devices)
        shares[device] = took[devices == device].sum() / max(count, 1)
    return Forecast(
        **run.choice._asdict(),
        chunks=tuple((c.start, c.num_tokens, c.compiled_size) for c in graph.chunks),
        makespan_s=makespan_ns / 1e9,
        lower_bound_s=bound_ns / 1e9,
        overlap_efficiency=bound_ns / makespan_ns,
        bound=bound,
        bottleneck=max(shares, key=lambda device: shares[device]),
        busy_s=busy,
        hidden=hidden_share(run.schedule, devices == "cpu", run.start_ns, run.end_ns),
        buffer_bytes=sum(graph.buffer_bytes),
    )


def hidden_share(schedule: Schedule, is_cpu: Any, start_ns: Any, end_ns: Any) -> float:
    """The share of the CPU's time during which another worker was busy too."""
    events: list[tuple[int, int, int]] = []
    for tasks in schedule.workers:
        for task in tasks:
            if task >= 0:
                cpu = int(is_cpu[task])
                events += [(int(start_ns[task]), 1, cpu), (int(end_ns[task]), -1, -cpu)]
    events.sort()
    running = on_cpu = total = hidden = last = 0
    for at, change, cpu in events:
        total += on_cpu * (at - last)
        hidden += on_cpu * (at - last) if running > 1 else 0
        running, on_cpu, last = running + change, on_cpu + cpu, at
    return hidden / total if total else 0.0


def candidates(split: Split, num_tokens: int, profile: Profile, threads: int) -> Iterator[Choice]:
    """Every choice worth a try on this many threads in all that the profile's devices can run, simple ones first."""
    seen: set[tuple[Any, ...]] = set()
    for chunk in _chunk_sizes(split, num_tokens):
        for name in MAKERS:
            for choice in (
                *_with_workers(split, name, threads, chunk),
                *_apart(split, name, profile, threads, chunk),
            ):
                if _too_many(split, choice, profile):
                    continue
                count = len(chunks_of(split, choice, num_tokens))
                if name != "sequential" and count == 1:
                    continue
                found = (*choice._replace(chunk=0), chunks_of(split, choice, num_tokens))
                if found not in seen:
                    seen.add(found)
                    yield choice


def _chunk_sizes(split: Split, num_tokens: int) -> list[int]:
    """The most tokens of a chunk: the program's sizes, or its most rows and halves of it."""
    shape = chunk_shape(split)
    if isinstance(shape, FixedSizes):
        sizes = sorted(shape.sizes, reverse=True)
        # Chunks of one token are worth a thought for very short prompts alone.
        return [size for size in sizes if num_tokens / size <= 256] or sizes[:1]
    most = most_rows(shape)
    return [size for size in (most, most // 2, most // 4) if size >= 16] or [most]


def _with_workers(split: Split, name: str, threads: int, chunk: int) -> Iterator[Choice]:
    if name == "sequential":
        for count in sorted({1, threads}):
            yield default_choice(split, name, count, None, chunk)
        return
    if threads < 2:
        return
    counts = sorted({2, threads, *(2**i for i in range(1, 8) if 2**i < threads)})
    for count in counts if name != "lockstep" else [2]:
        yield default_choice(split, name, count, None, chunk)


def _apart(split: Split, name: str, profile: Profile, threads: int, chunk: int) -> Iterator[Choice]:
    """A worker a device, the CPU's with all of its threads: for devices that share no cores with it."""
    devices = tuple(dict.fromkeys(segment.device for segment in split.segments))
    cpu = profile.devices.get("cpu")
    if name in ("sequential", "wavefront") or len(devices) < 2 or cpu is None or cpu.workers is None:
        return
    yield default_choice(split, name, len(devices), devices, chunk)._replace(
        threads=min(cpu.workers, threads)
    )


def plan(
    split: Split, num_tokens: int, profile: Profile, threads: int, only: Sequence[Choice] | None = None
) -> Plan:
    """Simulate every candidate (or those given) for a prompt of this length.

    Raises InputError for a length below 1, and where the profile does not fit.
    """
    if num_tokens < 1:
        raise InputError(f"prompt-len: found {num_tokens}, expected at least 1")
    tried = [
        forecast(simulate(split, choice, num_tokens, profile), profile)
        for choice in (only if only is not None else candidates(split, num_tokens, profile, threads))
    ]
    best = min(item.makespan_s for item in tried)
    chosen = next(item for item in tried if item.makespan_s <= best * (1 + _WORTH))
    return Plan(num_tokens, chosen, tuple(sorted(tried, key=lambda item: item.makespan_s)))


def choice_of(found: Forecast) -> Choice:
    """The choice that a forecast is of."""
    return Choice(**{key: getattr(found, key) for key in Choice._fields})


def lengths_up_to(most: int) -> list[int]:
    """A grid of prompt lengths, `most` the last."""
    return [length for length in _LENGTHS if length < most] + [most]


def decisions(split: Split, profile: Profile, threads: int, max_tokens: int) -> tuple[Decision, ...]:
    """The choice for every prompt length up to `max_tokens`: what `auto` looks up. Lengths between two of a grid go
    with the longer one."""
    found = [(length, plan(split, length, profile, threads).chosen) for length in lengths_up_to(max_tokens)]
    return merged([Decision(n, choice_of(chosen), round(chosen.makespan_s, 6)) for n, chosen in found])


def merged(found: Sequence[Decision]) -> tuple[Decision, ...]:
    """One decision for neighbouring lengths that are run alike: that of the longest."""
    return tuple(
        decision
        for decision, following in zip(found, [*found[1:], None], strict=True)
        if following is None or following.choice != decision.choice
    )
