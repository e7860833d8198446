"""The split as data: it prints, parses and refuses what it did not write."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.ir.manifest import from_plain, to_plain
from doubleweave.ir.split import ITEM_BYTES, FixedSizes, Split, Value, rows

SHAPES = st.one_of(
    st.builds(rows, st.just(1), st.integers(1, 64), st.integers(0, 64)),
    st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True).map(
        lambda s: FixedSizes(tuple(sorted(s)))
    ),
)


@given(st.integers(1, 4), SHAPES)
def test_survives_json(num_layers, shape):
    split = toys.split(num_layers, shape)
    assert from_plain(Split, json.loads(json.dumps(to_plain(split)))) == split


@given(st.integers(1, 4), SHAPES)
def test_every_value_has_one_writer_or_is_an_input(num_layers, shape):
    split = toys.split(num_layers, shape)
    writer = split.writer()
    assert set(writer) == {value.name for value in split.values if value.kind != "input"}
    assert all(name in split.calls[index].writes for name, index in writer.items())


def test_methods_are_named_by_size():
    assert toys.split(1, FixedSizes((1, 8))).segment("block_0").methods() == {"block_0@1": 1, "block_0@8": 8}
    assert toys.split(1, rows(1, 8)).segment("block_0").methods() == {"block_0": None}


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_row_bytes_counts_numbers_alone(dtype):
    assert Value("x", dtype, (1, "T", 6, 2), "chunk").row_bytes == 12 * ITEM_BYTES[dtype]


def test_prints_one_line_a_call(golden):
    golden("split.txt", str(toys.split(1, FixedSizes((1, 8)))))


@pytest.mark.parametrize("key", ["segments", "functions"])
def test_refuses_missing_and_unknown_keys(key):
    data = to_plain(toys.split(1, rows(1, 8)))
    with pytest.raises(TypeError, match="surprise"):
        from_plain(Split, {**data, key: [{**data[key][0], "surprise": 1}]})
    del data[key]
    with pytest.raises(TypeError, match=key):
        from_plain(Split, data)
