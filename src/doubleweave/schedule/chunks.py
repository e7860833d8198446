"""Cut a prompt into chunks. It knows nothing of segments or schedules."""

from __future__ import annotations

from typing import NamedTuple

from doubleweave import _scheduling
from doubleweave.ir.split import FixedSizes, SizeRanges, most_rows


class Chunk(NamedTuple):
    """Consecutive tokens; a static segment computes `compiled_size` rows, of which those behind `num_tokens` are
    padding."""

    start: int
    num_tokens: int
    compiled_size: int


def cut(
    num_tokens: int, shape: FixedSizes | SizeRanges, num_workers: int = 1, *, most: int | None = None
) -> tuple[Chunk, ...]:
    """Cut `num_tokens` into chunks for a shape, of at most `most` tokens; only the last chunk is padded.

    Bounded rows: chunks of equal size, as many as the workers can share evenly. Fixed sizes: the cheapest
    sequence of sizes, counting padding and calls; the smallest is used whatever `most` is.
    """
    assert num_tokens > 0
    sizes = shape.sizes if isinstance(shape, FixedSizes) else ()
    limit = most or most_rows(shape)
    return tuple(
        Chunk(*chunk) for chunk in _scheduling.cut(num_tokens, sizes, most_rows(shape), num_workers, limit)
    )
