"""Cut a prompt into chunks. It knows nothing of segments or schedules."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from doubleweave.ir.split import FixedSizes, SizeRanges, most_rows

# Below this many rows a chunk's linears no longer run at full speed, so more chunks do not pay.
_LEAST_ROWS = 32
# What one more chunk costs, in rows of work: a method call for every segment.
_CALL_ROWS = 8


class Chunk(NamedTuple):
    """Consecutive tokens; a static segment computes `compiled_size` rows, the last of them padding."""

    start: int
    num_tokens: int
    compiled_size: int


def cut(
    num_tokens: int, shape: FixedSizes | SizeRanges, num_workers: int = 1, *, most: int | None = None
) -> tuple[Chunk, ...]:
    """Cut `num_tokens` into chunks for a shape, of at most `most` tokens; only the last one is padded.

    Bounded rows: chunks of equal size, as many as the workers can share evenly. Fixed sizes: the cheapest
    sequence of sizes, counting padding and calls; the smallest is used whatever `most` is.
    """
    assert num_tokens > 0
    limit = min(most or most_rows(shape), most_rows(shape))
    if isinstance(shape, SizeRanges):
        sizes = _even(num_tokens, limit, num_workers)
    else:
        least = min(shape.sizes)
        sizes = _fixed(num_tokens, tuple(sorted(size for size in shape.sizes if size <= max(limit, least))))
    chunks = []
    start = 0
    for size in sizes:
        tokens = min(size, num_tokens - start)
        chunks.append(Chunk(start, tokens, size))
        start += tokens
    return tuple(chunks)


def _even(num_tokens: int, most: int, num_workers: int) -> list[int]:
    count = -(-num_tokens // most)
    if num_workers > 1:
        rounded = -(-count // num_workers) * num_workers
        count = max(count, min(rounded, num_tokens // _LEAST_ROWS or 1))
    base, extra = divmod(num_tokens, count)
    return [base + (i < extra) for i in range(count)]


def _fixed(num_tokens: int, sizes: tuple[int, ...]) -> list[int]:
    largest = sizes[-1]
    full = max(0, num_tokens // largest - 1)
    return [largest] * full + list(_cheapest(num_tokens - full * largest, sizes))


@cache
def _cheapest(num_tokens: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The cheapest sequence of sizes that covers the tokens, largest first, padding only at its end."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for tokens in range(1, num_tokens + 1):
        options = []
        for size in sizes:
            cost, before = best[max(0, tokens - size)]
            options.append((cost + size + _CALL_ROWS, (*before, size)))
        best.append(min(options))
    return tuple(sorted(best[num_tokens][1], reverse=True))
