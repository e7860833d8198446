"""Choose how a prompt is run: simulate the candidates on a profile and take the fastest. No torch, no ExecuTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from doubleweave._scheduling import lengths_up_to
from doubleweave.errors import InputError
from doubleweave.predict.plan_run import PlannedRun, RunPlanner
from doubleweave.predict.profile import Decision
from doubleweave.schedule.choice import Choice, Wish, devices_of
from doubleweave.schedule.costs import lower_bound_ns
from doubleweave.schedule.schedule import ANY, Schedule
from doubleweave.schedule.simulate import times

# A candidate must be faster than a simpler one by this share to be taken, as in native/scheduling/planner.cpp: smaller
# differences are within the errors of prediction, and a simpler choice takes less memory.
WORTH = 0.01


class Run(NamedTuple):
    """A planned run and its simulated times, in nanoseconds."""

    planned: PlannedRun
    start_ns: Any
    end_ns: Any


@dataclass(frozen=True)
class Forecast:
    """The simulated run of a choice. `chunks` are (start, tokens, compiled size).

    `bound` names the part of the lower bound that is the largest, `bottleneck` the device that is busy for the largest
    share of the time. `busy_s` has the seconds of each worker. `hidden` is the share of the CPU's time during which
    another worker was busy too.
    """

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
    """The candidates for one prompt length, fastest first. `chosen` is the simplest of those within 1% of the fastest,
    `auto` the run of a prompt for which no schedule is named."""

    num_tokens: int
    chosen: Forecast
    auto: Forecast
    candidates: tuple[Forecast, ...]


def simulate(planner: RunPlanner, choice: Choice, num_tokens: int) -> Run:
    """Run a prompt on the planner's profile. Raises ScheduleError or InputError where schedule, workers or profile do
    not fit."""
    profile = planner.profile
    # The device would run the tasks beyond its number one after the other, which the simulator does not model.
    for device, most in zip(devices_of(planner.split), planner.most_tasks, strict=True):
        count = sum(worker in (device, ANY) for worker in choice.workers)
        if most and count > most:
            raise InputError(
                f"workers: found {count} that run tasks of device {device!r}, expected at most {most} (as many run on "
                f"it at once on {profile.name})"
            )
    planned = planner.plan_run(choice, num_tokens)
    return Run(planned, *times(planned.graph, planned.schedule, planned.costs))


def forecast(run: Run) -> Forecast:
    """Sum a simulated run up."""
    choice, graph, schedule = run.planned.choice, run.planned.graph, run.planned.schedule
    bound_ns, bound = lower_bound_ns(graph, schedule.devices, run.planned.costs)
    makespan_ns = int(run.end_ns.max())
    took = run.end_ns - run.start_ns
    devices = np.array(graph.devices)[graph.call_of]
    shares = {}
    for device in sorted(set(graph.devices)):
        count = sum(of in (device, ANY) for of in schedule.devices)
        # Over the device's workers: two CPU workers that are each half busy limit nothing.
        shares[device] = took[devices == device].sum() / max(count, 1)
    return Forecast(
        **choice._asdict(),
        chunks=tuple((c.start, c.num_tokens, c.compiled_size) for c in graph.chunks),
        makespan_s=makespan_ns / 1e9,
        lower_bound_s=bound_ns / 1e9,
        overlap_efficiency=bound_ns / makespan_ns if makespan_ns else 1.0,
        bound=bound,
        bottleneck=max(shares, key=lambda device: shares[device]),
        busy_s=tuple(float(took[[t for t in tasks if t >= 0]].sum()) / 1e9 for tasks in schedule.workers),
        hidden=hidden_share(schedule, devices == "cpu", run.start_ns, run.end_ns),
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
    events.sort()  # at equal times ends come first, so that tasks that only touch do not overlap
    running = on_cpu = total = hidden = last = 0
    for at, change, cpu in events:
        total += on_cpu * (at - last)
        hidden += on_cpu * (at - last) if running > 1 else 0
        running, on_cpu, last = running + change, on_cpu + cpu, at
    return hidden / total if total else 0.0


def plan(planner: RunPlanner, num_tokens: int, threads: int) -> Plan:
    """Simulate every candidate for a prompt of this length.

    Raises InputError for a length below 1, and where the profile does not fit.
    """
    if num_tokens < 1:
        raise InputError(f"prompt-len: found {num_tokens}, expected at least 1")
    candidates = planner.candidates(num_tokens, threads)
    tried = [forecast(simulate(planner, choice, num_tokens)) for choice in candidates]
    best = min(item.makespan_s for item in tried)
    chosen = next(item for item in tried if item.makespan_s <= best * (1 + WORTH))
    # Measured decisions, or a rule, may say another choice than the prediction: the plan shows both.
    auto = forecast(simulate(planner, planner.choose(Wish(threads=threads), num_tokens), num_tokens))
    return Plan(num_tokens, chosen, auto, tuple(sorted(tried, key=lambda item: item.makespan_s)))


def choice_of(found: Forecast) -> Choice:
    """The choice that a forecast is of."""
    return Choice(**{key: getattr(found, key) for key in Choice._fields})


def decisions(planner: RunPlanner, threads: int, max_tokens: int) -> tuple[Decision, ...]:
    """The choice for every prompt length up to `max_tokens`, for `auto` to look up. Lengths between two of a grid go
    with the longer one."""
    found = []
    for length in lengths_up_to(max_tokens):
        choice = planner.best(length, threads)
        makespan_ns = int(simulate(planner, choice, length).end_ns.max())
        found.append(Decision(length, choice, round(makespan_ns / 1e9, 6)))
    return merged(found)


def merged(found: Sequence[Decision]) -> tuple[Decision, ...]:
    """The decisions without those that the next longer length repeats."""
    return tuple([*alike][-1] for _, alike in groupby(found, key=lambda decision: decision.choice))
