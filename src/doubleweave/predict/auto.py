"""How a prompt is run where nothing was planned for its program."""

from __future__ import annotations

from doubleweave.ir.split import Split
from doubleweave.vendors.library import libraries_of


def overlapping_schedule(split: Split) -> str:
    """The schedule of several chunks where none was planned: a wavefront, and out of order with an NPU."""
    has_npu = any(library.is_npu for library in libraries_of(split).values())
    return "out_of_order" if has_npu else "wavefront"
