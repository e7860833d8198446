"""Scratch groups: which segments share scratch memory, so that chunks in flight never meet in it.

A block's scratch (3 MB at 128 rows) is dead between runs, so blocks share it in a few groups: block i is in group i mod
n. Scratch of their own for 30 blocks would take 90 MB, and one for all would make them lock each other out. Two chunks
in flight use one group at once only if they are n blocks apart; the task graph keeps them closer than that. Where n
divides the number of blocks, the end of a chunk and the beginning of the next one keep apart as well. This file knows
nothing of how memory is allocated.
"""

from __future__ import annotations

from doubleweave.ir.split import Split

# Each group takes megabytes, and fewer groups hold chunks in flight closer together: about five, and rather a number
# that divides the blocks.
_PREFERRED = (5, 6, 7, 4, 8)


def blocks(split: Split) -> list[int]:
    """The calls that every chunk runs in a delegate, in order: those that append to the cache."""
    segments = {call: split.segment(split.calls[call].segment) for call in split.appending}
    # A recurrence runs row by row: its scratch memory is small.
    return [call for call, segment in segments.items() if segment.num_delegated and not segment.each_row]


def num_groups(split: Split) -> int:
    """How many groups the blocks are spread over."""
    count = len(blocks(split))
    return next((n for n in _PREFERRED if count % n == 0), _PREFERRED[0]) if count > _PREFERRED[0] else count


def groups(split: Split) -> dict[str, int]:
    """The group of each segment that shares; the others have scratch of their own."""
    count = num_groups(split)
    return {split.calls[call].segment: i % count for i, call in enumerate(blocks(split))}
