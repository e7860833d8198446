"""How a prompt is run: schedule, workers, threads, chunks. The choice of the planner, which a session follows.

It knows nothing of costs or memory.
"""

from __future__ import annotations

from typing import NamedTuple

from doubleweave import _scheduling
from doubleweave.ir.split import FixedSizes, SizeRanges, Split, most_rows
from doubleweave.schedule.chunks import Chunk, cut
from doubleweave.schedule.makers import MAKERS
from doubleweave.schedule.pattern import Want
from doubleweave.schedule.task_graph import TaskGraph, build

AUTO = "auto"
SCHEDULES = (AUTO, *MAKERS)


class Choice(NamedTuple):
    """`threads` is the number of each worker's methods. `chunk` is the most tokens of a chunk. `in_flight` chunks have
    buffers at once. `abreast` divides the number of chunks where they may have any size, so that each worker of a
    wavefront gets as many."""

    schedule: str
    workers: tuple[str, ...]
    threads: int
    chunk: int
    in_flight: int
    abreast: int = 1


class Wish(NamedTuple):
    """What the user asks for: AUTO chooses workers and chunks itself. `threads` are those in all; None is the
    default."""

    schedule: str = AUTO
    threads: int | None = None
    workers: tuple[str, ...] | None = None
    chunk: int | None = None


def as_choice(found: tuple[str, list[str], int, int, int, int]) -> Choice:
    """The choice that the native module gives as a tuple."""
    schedule, workers, *numbers = found
    return Choice(schedule, tuple(workers), *numbers)


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
    most = most_rows(chunk_shape(split))
    return as_choice(_scheduling.default_choice(schedule, workers, chunk, threads, devices_of(split), most))


def devices_of(split: Split) -> tuple[str, ...]:
    """The devices of a program's segments, in order."""
    return tuple(dict.fromkeys(segment.device for segment in split.segments))


def chunk_shape(split: Split) -> FixedSizes | SizeRanges:
    """The shape that chunks are cut for: that of the segments that append to the cache."""
    cached = {value.name for value in split.values if value.kind == "cache"}
    return next(split.segment(call.segment).shape for call in split.calls if cached.intersection(call.writes))


def static_device(split: Split) -> str:
    """The device of the segments that append to the cache."""
    cached = {value.name for value in split.values if value.kind == "cache"}
    return next(
        split.segment(call.segment).device for call in split.calls if cached.intersection(call.writes)
    )


def chunks_of(split: Split, choice: Choice, num_tokens: int) -> tuple[Chunk, ...]:
    """Cut a prompt as the choice says."""
    return cut(num_tokens, chunk_shape(split), choice.abreast, most=choice.chunk)


def graph_of(split: Split, choice: Choice, chunks: tuple[Chunk, ...], want: Want) -> TaskGraph:
    """The task graph that a choice runs on."""
    abreast = _scheduling.num_abreast(choice, static_device(split), len(chunks))
    return build(split, chunks, want, choice.in_flight, abreast=abreast)
