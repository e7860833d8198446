"""Cutting prompts into chunks: properties over lengths, shapes and workers."""

from __future__ import annotations

from itertools import combinations_with_replacement

from hypothesis import given
from hypothesis import strategies as st

from doubleweave.ir.split import FixedSizes, rows
from doubleweave.schedule.chunks import Chunk, cut

# The cost of one more chunk, in rows of work (native/scheduling/chunks.cpp).
CALL_ROWS = 8
LENGTHS = st.integers(1, 1500)
SIZES = st.lists(st.integers(1, 128), min_size=1, max_size=4, unique=True).map(tuple)
BOUNDED = st.builds(rows, st.just(1), st.integers(1, 200))
ANY_SHAPE = st.one_of(BOUNDED, st.builds(FixedSizes, SIZES))


@given(LENGTHS, ANY_SHAPE, st.integers(1, 8))
def test_chunks_cover_the_prompt_exactly_once(num_tokens, shape, num_workers):
    chunks = cut(num_tokens, shape, num_workers)
    assert [chunk.start for chunk in chunks] == [
        sum(c.num_tokens for c in chunks[:i]) for i in range(len(chunks))
    ]
    assert sum(chunk.num_tokens for chunk in chunks) == num_tokens
    assert all(chunk.num_tokens >= 1 for chunk in chunks)


@given(LENGTHS, SIZES, st.integers(1, 8))
def test_fixed_chunks_have_an_allowed_size_and_only_the_last_is_padded(num_tokens, sizes, num_workers):
    chunks = cut(num_tokens, FixedSizes(sizes), num_workers)
    assert {chunk.compiled_size for chunk in chunks} <= set(sizes)
    assert all(chunk.num_tokens == chunk.compiled_size for chunk in chunks[:-1])
    assert chunks[-1].num_tokens <= chunks[-1].compiled_size


@given(LENGTHS, BOUNDED, st.integers(1, 8))
def test_bounded_chunks_are_even_and_never_padded(num_tokens, shape, num_workers):
    chunks = cut(num_tokens, shape, num_workers)
    sizes = [chunk.num_tokens for chunk in chunks]
    assert sizes == [chunk.compiled_size for chunk in chunks]
    _, low, high = shape.range("T")
    assert low <= min(sizes) <= max(sizes) <= high
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(512, 2000), st.integers(2, 8))
def test_a_long_prompt_is_shared_evenly_by_the_workers(num_tokens, num_workers):
    assert len(cut(num_tokens, rows(1, 128), num_workers)) % num_workers == 0


@given(st.data(), st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True))
def test_fixed_sizes_are_the_cheapest_sequence(data, sizes):
    num_tokens = data.draw(st.integers(1, 2 * max(sizes) - 1))  # where every sequence can be tried

    def cost(sequence):
        return sum(size + CALL_ROWS for size in sequence)

    cheapest = min(
        cost(sequence)
        for count in range(1, num_tokens + 1)
        for sequence in combinations_with_replacement(sizes, count)
        if sum(sequence) >= num_tokens
    )
    assert cost(chunk.compiled_size for chunk in cut(num_tokens, FixedSizes(tuple(sizes)))) == cheapest


def test_known_cuts():
    assert cut(1, FixedSizes((1, 32, 128))) == (Chunk(0, 1, 1),)
    assert cut(33, FixedSizes((1, 32, 128))) == (Chunk(0, 32, 32), Chunk(32, 1, 1))
    assert cut(300, rows(1, 128)) == (Chunk(0, 100, 100), Chunk(100, 100, 100), Chunk(200, 100, 100))
