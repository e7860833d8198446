"""What is lowered: each structure once a size, for all the segments that have it.

lower.py lowers it, templates.py makes a template of the result, and pte_file.py puts each segment's own weights in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass

from doubleweave.ir.split import Range, Segment, SizeRanges, Split
from doubleweave.vendors.library import library_of


@dataclass(frozen=True)
class Job:
    """Lower a segment at one size (None: its range of sizes), or at several sizes whose methods share a context.

    `is_shared`: over made-up weights, so that the template serves every segment of the structure.
    """

    segment: Segment
    sizes: tuple[int | None, ...]
    is_shared: bool

    @property
    def methods(self) -> dict[str, int | None]:
        return {name: size for name, size in self.segment.methods().items() if size in self.sizes}

    def __str__(self) -> str:
        return ", ".join(self.methods)


Key = tuple[str, int | tuple[Range, ...]]


def shared_key(segment: Segment, size: int | None) -> Key:
    """The key under which segments share a template: the structure, with a size or the ranges of its sizes."""
    if size is not None:
        return segment.structure, size
    return segment.structure, segment.shape.ranges if isinstance(segment.shape, SizeRanges) else ()


def jobs(split: Split, large: Set[str] = frozenset()) -> list[Job]:
    """The lowerings of a split: each structure once a size, NPUs' first, the longest first among equals.

    `large`: the structures that are lowered over made-up weights even where one segment alone has them. The last job
    may run in this process (forked.py) and so be there when others fork. The libraries of NPUs do not survive a fork,
    so their jobs come first.
    """
    count = Counter(segment.structure for segment in split.segments)
    found: dict[Key, Job] = {}
    for segment in split.segments:
        for sizes in _together(segment):
            job = Job(segment, sizes, count[segment.structure] > 1 or segment.structure in large)
            found.setdefault(shared_key(segment, sizes[0]), job)
    return sorted(
        found.values(),
        key=lambda job: (
            not library_of(job.segment.backend).is_npu,
            # The best guess there is of the time a job takes; long ones begun last would leave other cores idle.
            -len(job.segment.inputs) - len(job.segment.outputs),
        ),
    )


def _together(segment: Segment) -> list[tuple[int | None, ...]]:
    """A segment's sizes in groups: the methods of one group are lowered into one context, and share its weights."""
    sizes = tuple(segment.methods().values())
    return [sizes] if segment.contexts == 1 else [(size,) for size in sizes]
