"""A choice: the schedule, workers, threads and chunks that run a prompt. The planner makes it, a session follows it.

It knows nothing of costs or memory.
"""

from __future__ import annotations

from typing import NamedTuple

from doubleweave import _scheduling
from doubleweave.ir.split import FixedSizes, Segment, SizeRanges, Split, most_rows
from doubleweave.schedule.chunks import Chunk, cut
from doubleweave.schedule.makers import MAKERS
from doubleweave.schedule.pattern import Want
from doubleweave.schedule.task_graph import TaskGraph, build

AUTO = "auto"
SCHEDULES = (AUTO, *MAKERS)


class Choice(NamedTuple):
    """`workers` are the devices of the workers, and each method of a worker uses `threads` threads. `chunk` is the most
    tokens of a chunk. `in_flight` chunks have buffers at once. The number of chunks is a multiple of `abreast` where
    chunks may have any size, so that every worker of a wavefront gets equally many."""

    schedule: str
    workers: tuple[str, ...]
    threads: int
    chunk: int
    in_flight: int
    abreast: int = 1


class Wish(NamedTuple):
    """The user's part of a choice; None leaves a part to the planner, and AUTO all but `threads`. `threads` counts
    those of all workers together."""

    schedule: str = AUTO
    threads: int | None = None
    workers: tuple[str, ...] | None = None
    chunk: int | None = None


def as_choice(found: tuple[str, list[str], int, int, int, int]) -> Choice:
    """The choice of a tuple that the native module returns."""
    schedule, workers, *numbers = found
    return Choice(schedule, tuple(workers), *numbers)


def default_choice(split: Split, schedule: str, threads: int) -> Choice:
    """The choice for a named schedule on `threads` threads in all, whatever a profile says.

    Raises InputError for a schedule that does not exist.
    """
    most = most_rows(chunk_shape(split))
    return as_choice(_scheduling.default_choice(schedule, None, None, threads, devices_of(split), most))


def devices_of(split: Split) -> tuple[str, ...]:
    """The devices of a program's segments, in order."""
    return tuple(dict.fromkeys(segment.device for segment in split.segments))


def chunk_shape(split: Split) -> FixedSizes | SizeRanges:
    """The shape that chunks are cut for: that of the segments that take whole chunks."""
    return _of_chunks(split).shape


def static_device(split: Split) -> str:
    """The device of the segments that take whole chunks."""
    return _of_chunks(split).device


def _of_chunks(split: Split) -> Segment:
    """The first segment that appends to the cache and takes whole chunks; others have its shape and device.

    One of fixed sizes comes first, also where another segment stores what it computed in the cache (a lookup on the
    CPU, or a segment that was kept there, may take any number of rows); the head may have sizes of its own.
    """
    appending = [split.segment(split.calls[place].segment) for place in split.appending]
    every = [split.segment(call.segment) for call in split.calls]
    whole = [split.segment(call.segment) for call in split.calls if call.rows == "all"]
    fixed = [segment for segment in (*appending, *whole) if isinstance(segment.shape, FixedSizes)]
    return next(segment for segment in (*fixed, *appending, *every) if not segment.each_row)


def chunks_of(split: Split, choice: Choice, num_tokens: int) -> tuple[Chunk, ...]:
    """Cut a prompt as the choice says."""
    return cut(num_tokens, chunk_shape(split), choice.abreast, most=choice.chunk)


def graph_of(split: Split, choice: Choice, chunks: tuple[Chunk, ...], want: Want) -> TaskGraph:
    """The task graph that a choice runs on."""
    abreast = _scheduling.num_abreast(choice, static_device(split), len(chunks))
    return build(split, chunks, want, choice.in_flight, abreast=abreast)
