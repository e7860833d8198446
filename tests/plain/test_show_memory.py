"""The memory of a run, row by row: read off the plan, and consistent with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_module_plan
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.cli.show_memory import memory_of, of_plan, table
from doubleweave.errors import InputError
from doubleweave.ir.interface import Interface, Parameter
from doubleweave.ir.manifest import Manifest, ModelInfo
from doubleweave.ir.split import (
    Call,
    FixedSizes,
    Function,
    Port,
    Range,
    Segment,
    SizeRanges,
    Split,
    Value,
    rows,
)
from doubleweave.ir.trees import Tree

TENSOR = Tree("tensor")


def manifest(split, model=None):
    return Manifest("Net", model, split, "", 0, "", {})


@given(test_module_plan.splits(), st.integers(1, test_module_plan.MOST))
def test_rows_say_what_the_plan_says(split, rows):
    plan = test_module_plan.plan_of(split, test_module_plan.example(split.main, rows))
    memory = of_plan(plan)
    assert memory.buffer_bytes == sum(plan.buffer_bytes)
    assert memory.peak_bytes == plan.peak_bytes() <= memory.buffer_bytes
    used = [tensor for tensor in plan.tensors if tensor.readers or tensor.writers]
    assert len(memory.rows) == len(used)
    for row, tensor in zip(memory.rows, used, strict=True):
        assert row.num_bytes == tensor.num_bytes
        assert row.value.startswith(tensor.name)
        assert len(row.readers) == len(set(tensor.readers))
        if tensor.place == "buffer":
            assert row.owner == f"run, buffer {tensor.number}"
            assert row.freed.startswith("after ")
            assert row.num_bytes <= plan.buffer_bytes[tensor.number]
        elif tensor.place == "state":
            assert (row.owner, row.freed) == ("session", "by the session")
        else:
            assert (row.owner, row.freed) == ("caller", "by the caller")
            assert (row.writer == "input") == (tensor.place == "input")
    # No moment needs more than what the rows of one buffer each say.
    largest = {}
    for row in memory.rows:
        if row.owner.startswith("run"):
            largest[row.owner] = max(largest.get(row.owner, 0), row.num_bytes)
    assert sum(largest.values()) == memory.buffer_bytes


def test_a_chain_in_words():
    row = test_module_plan.ROW
    split = test_module_plan.chain(
        test_module_plan.segment("first", test_module_plan.DYNAMIC, [row], [row]),
        test_module_plan.segment("second", FixedSizes((4,)), [row], [row]),
    )
    memory = memory_of(manifest(split), None, {"T": 6})
    assert [row.value for row in memory.rows[:3]] == ["x", "y0", "y1"]
    assert [(r.owner, r.num_bytes, r.writer, r.readers, r.freed) for r in memory.rows] == [
        ("caller", 144, "input", ("c0",), "by the caller"),
        ("run, buffer 0", 144, "c0", ("c1", "c1/1 (copy)"), "after c1/1 (copy)"),
        ("caller", 144, "c1", (), "by the caller"),
        # The last chunk's rows, padded, and its results before the padding is cut off.
        ("run, buffer 1", 96, "c1/1 (copy)", ("c1/1",), "after c1/1"),
        ("run, buffer 0", 96, "c1/1", ("c1/1 (copy)",), "after c1/1 (copy)"),
    ]
    assert (memory.buffer_bytes, memory.peak_bytes) == (240, 240)
    text = table(memory)
    assert text.splitlines()[0].split() == ["value", "owner", "bytes", "written", "by", "read", "by", "freed"]
    assert text.endswith("buffers of the run: 240 bytes; the most in use at one time: 240 bytes")
    assert len(text.splitlines()) == 1 + len(memory.rows) + 1


def test_states_show_both_buffers():
    segments, function = test_module_plan.counter(test_module_plan.DYNAMIC, outputs=("x",))
    memory = memory_of(manifest(Split(segments, (function,))), None, {"T": 2})
    states = [row for row in memory.rows if row.owner == "session"]
    assert [(row.value, row.num_bytes) for row in states] == [("n (0)", 8), ("n (1)", 8)]
    assert [row.writer for row in states] == ["state", "sums"]


def test_many_readers_are_shortened():
    row = test_module_plan.ROW
    segments = [test_module_plan.segment(f"s{i}", test_module_plan.DYNAMIC, [row], [row]) for i in range(5)]
    calls = tuple(Call(f"c{i}", f"s{i}", ("x",), (f"y{i}",)) for i in range(5))
    values = (Value("x", "int64", row, "input"), *(Value(f"y{i}", "int64", row, "chunk") for i in range(5)))
    split = Split(tuple(segments), (Function("", calls, values, ("y4",), (Range("T", 1, 9),)),))
    assert "c0, … 4 more" in table(memory_of(manifest(split), None, {}))


def two_symbols():
    shape = SizeRanges((Range("m", 2, 9), Range("S", "m", 20)))
    ports = (Port("in0", "int64", ("m", 3)), Port("in1", "int64", ("S",)))
    values = (
        Value("a", "int64", ("m", 3), "input"),
        Value("b", "int64", ("S",), "input"),
        Value("y", "int64", ("m", 3), "output"),
    )
    parameters = tuple(Parameter(name, "POSITIONAL_OR_KEYWORD", TENSOR, None) for name in "ab")
    function = Function(
        "",
        (Call("c", "s", ("a", "b"), ("y",)),),
        values,
        ("y",),
        shape.ranges,
        interface=Interface(parameters, TENSOR),
    )
    segment = Segment("s", "cpu", "xnnpack", shape, ports, (Port("out0", "int64", ("m", 3)),), "s")
    return manifest(Split((segment,), (function,)))


def test_sizes_are_the_largest_unless_given():
    assert [row.num_bytes for row in memory_of(two_symbols(), None, {}).rows] == [216, 160, 216]
    assert [row.num_bytes for row in memory_of(two_symbols(), None, {"m": 4}).rows] == [96, 160, 96]
    assert [row.num_bytes for row in memory_of(two_symbols(), None, {"m": 4, "S": 4}).rows] == [96, 32, 96]


@pytest.mark.parametrize(
    ("tokens", "sizes", "message"),
    [
        (None, {"q": 3}, "size: found dim 'q', expected one of this program's: m, S"),
        (None, {"m": 1}, "size: found m = 1, expected 2 to 9"),
        (None, {"m": 10}, "size: found m = 10, expected 2 to 9"),
        (None, {"m": 6, "S": 5}, "size: found S = 5, expected m to 20"),
        (12, {}, "prompt-len: this is no language model; give --size SYMBOL=N"),
    ],
)
def test_sizes_that_the_program_does_not_have_are_refused(tokens, sizes, message):
    with pytest.raises(InputError, match=message):
        memory_of(two_symbols(), tokens, sizes)


def test_a_language_model_takes_a_prompts_length():
    model = ModelInfo(10, 64, (), None, {}, "none")
    split = two_symbols().split
    with pytest.raises(InputError, match="size: this is a language model; give --prompt-len"):
        memory_of(manifest(split, model), None, {"m": 3})
    for tokens in (0, 65):
        with pytest.raises(InputError, match=f"prompt-len: found {tokens}, expected 1 to 64"):
            memory_of(manifest(split, model), tokens, {})


def test_a_language_model_of_a_short_context_and_segments_of_any_name():
    split = toys.split(2, rows(1, 8))
    text = repr(memory_of(manifest(split, toys.model_info(max_context=16)), None, {}))
    names = {segment.name: f"part_{place}" for place, segment in enumerate(split.segments)}
    renamed = replace(
        split,
        segments=tuple(replace(segment, name=names[segment.name]) for segment in split.segments),
        functions=(
            replace(
                split.main,
                calls=tuple(replace(call, segment=names[call.segment]) for call in split.calls),
            ),
        ),
    )
    assert repr(memory_of(manifest(renamed, toys.model_info(max_context=16)), None, {})) == text
