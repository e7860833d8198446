"""The rule for prompts of a program that nothing was planned for."""

from __future__ import annotations

from doubleweave.ir.split import Split
from doubleweave.vendors.library import libraries_of


def overlapping_schedule(split: Split) -> str:
    """The schedule of several chunks where none was planned: a wavefront, and out of order with an NPU."""
    # Workers of a wavefront run every device's tasks; an NPU has workers of its own, which a strict order would leave
    # idle.
    has_npu = any(library.is_npu for library in libraries_of(split).values())
    return "out_of_order" if has_npu else "wavefront"
