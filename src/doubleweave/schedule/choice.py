"""How a prompt is run: schedule, workers, threads, chunks. What the planner chooses and a session follows.

It knows nothing of costs or memory.
"""

from __future__ import annotations

from typing import NamedTuple

from doubleweave.errors import InputError
from doubleweave.ir.split import NPU_BACKENDS, FixedSizes, SizeRanges, Split, most_rows
from doubleweave.schedule.chunks import Chunk, cut
from doubleweave.schedule.makers import MAKERS
from doubleweave.schedule.schedule import ANY
from doubleweave.schedule.task_graph import TaskGraph, Want, build

AUTO = "auto"
SCHEDULES = (AUTO, *MAKERS)
# Chunks that may be on their way at once where the schedule does not say: their buffers are memory.
_IN_FLIGHT = 8


class Choice(NamedTuple):
    """`chunk` is the most tokens of a chunk; `in_flight` how many chunks have buffers at once; of a number of chunks
    that `abreast` divides, each worker of a wavefront gets as many (it counts where chunks may have any size)."""

    schedule: str
    workers: tuple[str, ...]
    threads: int
    chunk: int
    in_flight: int
    abreast: int = 1


def default_choice(
    split: Split,
    schedule: str,
    threads: int,
    workers: tuple[str, ...] | None = None,
    chunk: int | None = None,
) -> Choice:
    """The choice that names of a schedule and a number of threads stand for.

    Raises InputError for a schedule or a worker's device that does not exist, and a chunk below 1.
    """
    if schedule not in MAKERS:
        raise InputError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    known = (*dict.fromkeys(segment.device for segment in split.segments), ANY)
    for device in workers or ():
        if device not in known:
            raise InputError(f"workers: found {device!r}, expected {', '.join(known[:-1])} or {ANY}")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk: found {chunk}, expected at least 1")
    given = workers or default_workers(split, schedule, threads)
    per_worker = threads if len(given) == 1 else 1
    in_flight = {"sequential": 1, "lockstep": 2, "wavefront": 2 * len(given)}.get(schedule, _IN_FLIGHT)
    abreast = len(given) if schedule == "wavefront" else 1
    return Choice(schedule, given, per_worker, chunk or most_rows(chunk_shape(split)), in_flight, abreast)


def check_schedule(schedule: str, workers: tuple[str, ...] | None = None, chunk: int | None = None) -> None:
    """Raises InputError for a schedule that does not exist, and for what `auto` chooses itself."""
    if schedule not in SCHEDULES:
        raise InputError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    for name, given in (("workers", workers), ("chunk", chunk)):
        if schedule == AUTO and given is not None:
            text = ",".join(given) if isinstance(given, tuple) else given
            raise InputError(f"{name}: found {text} with schedule auto, which chooses them; name a schedule")


def default_workers(split: Split, schedule: str, threads: int) -> tuple[str, ...]:
    """One worker a device, further ones for the CPU; a wavefront's and a sequential run's workers do everything."""
    devices = tuple(dict.fromkeys(segment.device for segment in split.segments))
    if schedule == "sequential" or (threads == 1 and len(devices) == 1):
        return (ANY,)
    if schedule == "wavefront":
        return (ANY,) * threads
    if len(devices) == 1:
        return devices * (2 if schedule == "lockstep" else threads)
    more = ("cpu",) * (threads - len(devices)) if "cpu" in devices and schedule != "lockstep" else ()
    return (*devices, *more)


def overlapping_schedule(split: Split) -> str:
    """The schedule of several chunks where none was planned: a wavefront, and out of order with an NPU."""
    return "out_of_order" if split.segments_of(*NPU_BACKENDS) else "wavefront"


def chunk_shape(split: Split) -> FixedSizes | SizeRanges:
    """The shape that chunks are cut for: that of the segments that append to the cache."""
    cached = {value.name for value in split.values if value.kind == "cache"}
    return next(split.segment(call.segment).shape for call in split.calls if cached.intersection(call.writes))


def chunks_of(split: Split, choice: Choice, num_tokens: int) -> tuple[Chunk, ...]:
    """Cut a prompt as the choice says."""
    return cut(num_tokens, chunk_shape(split), choice.abreast, most=choice.chunk)


def graph_of(split: Split, choice: Choice, chunks: tuple[Chunk, ...], want: Want) -> TaskGraph:
    """The task graph that a choice runs on."""
    statics = sum(worker == ANY for worker in choice.workers) or sum(
        worker == _static_device(split) for worker in choice.workers
    )
    return build(split, chunks, want, choice.in_flight, abreast=min(statics, len(chunks)))


def _static_device(split: Split) -> str:
    cached = {value.name for value in split.values if value.kind == "cache"}
    return next(
        split.segment(call.segment).device for call in split.calls if cached.intersection(call.writes)
    )
