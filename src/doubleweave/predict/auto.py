"""The schedule of several chunks where none was planned."""

from __future__ import annotations

from doubleweave.ir.split import NPU_BACKENDS, Split


def overlapping_schedule(split: Split) -> str:
    """The schedule of several chunks where none was planned: a wavefront, and out of order with an NPU."""
    return "out_of_order" if split.segments_of(*NPU_BACKENDS) else "wavefront"
