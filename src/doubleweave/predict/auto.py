"""How `--schedule auto` decides: the engine's planner chooses by decisions, by planning, or by a rule.

Planner::choose in native/scheduling/planner.cpp says which of them counts when; this file hands to it, and names the
schedule of its rule.
"""

from __future__ import annotations

from doubleweave import _scheduling
from doubleweave.ir.split import Split
from doubleweave.schedule.choice import Choice, Wish, as_choice
from doubleweave.vendors.library import libraries_of


def choose(planner: _scheduling.Planner, wish: Wish, num_tokens: int) -> Choice:
    """The choice for a prompt of that length; `wish.threads` must be settled. Raises InputError for a wish that does
    not fit the program."""
    assert wish.threads is not None
    return as_choice(planner.choose(num_tokens, wish.schedule, wish.threads, wish.workers, wish.chunk))


def overlapping_schedule(split: Split) -> str:
    """The schedule of several chunks where none was planned: a wavefront, and out of order with an NPU."""
    # Workers of a wavefront run every device's tasks; an NPU has workers of its own, which a strict order would leave
    # idle.
    has_npu = any(library.is_npu for library in libraries_of(split).values())
    return "out_of_order" if has_npu else "wavefront"
