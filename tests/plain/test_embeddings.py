"""A split entered behind its lookup: the same calls, or the reason why it takes no rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

import toys
from doubleweave.ir.embeddings import behind_lookup, lookup_of, why_no_rows
from doubleweave.ir.interface import Interface, Parameter
from doubleweave.ir.rules import language_model_problem, split_problem
from doubleweave.ir.split import Call, FixedSizes, Function, Port, Split, State, Value, rows
from doubleweave.ir.trees import Tree
from doubleweave.schedule.choice import default_choice, devices_of
from doubleweave.schedule.scratch_groups import groups


@pytest.mark.parametrize("shape", [rows(1, 32), FixedSizes((1, 8))])
def test_only_the_lookup_is_left_out(shape):
    split = toys.split(3, shape)
    entered, value = behind_lookup(split)
    assert why_no_rows(split) == ""
    assert value.type_text == "float32[1, T, 8]"
    assert entered.main.inputs == (value,)
    assert entered.calls == tuple(call for call in split.calls if call != lookup_of(split))
    assert split_problem(entered) is None
    # A session has one choice and one set of loaded methods for both.
    assert devices_of(entered) == devices_of(split)
    assert groups(entered) == groups(split)
    assert default_choice(entered, "wavefront", 2) == default_choice(split, "wavefront", 2)
    assert language_model_problem(split, 16, 64) is None


def changed(split: Split, **of_calls) -> Split:
    calls = tuple(of_calls.get(call.name, call) for call in split.calls)
    return replace(split, functions=(replace(split.main, calls=calls),))


def test_a_model_that_reads_ids_elsewhere_takes_no_rows():
    split = toys.split(1, rows(1, 32))
    block = next(call for call in split.calls if call.name == "block_1")
    more = changed(split, block_1=replace(block, reads=(*block.reads, "input_ids")))
    assert why_no_rows(more) == (
        "the model reads token ids in block_1 as well as where it looks up embeddings, and rows have no ids"
    )


def test_a_lookup_of_more_than_ids_takes_no_rows():
    split = toys.split(1, rows(1, 32))
    lookup = lookup_of(split)
    both = changed(split, embed_tokens=replace(lookup, reads=("input_ids", "position_ids")))
    assert "does not look its tokens up in one table" in why_no_rows(both)


def test_rows_of_another_dtype_are_none():
    split = toys.split(1, rows(1, 32))
    values = tuple(replace(v, dtype="float16") if v.name == "embedded" else v for v in split.values)
    half = replace(split, functions=(replace(split.main, values=values),))
    assert why_no_rows(half).startswith(
        "what the model looks up is float16[1, T, 8] (chunk), expected float32"
    )


def with_encoder(split: Split, **changes) -> Split:
    """The split and a function of one segment beside it, as an encoder is."""
    tensor = Tree("tensor")
    shape = (2, 8)
    port = Port("in0", "float32", shape)
    segment = replace(
        split.segment("lm_head"), name="eye.glue_0", shape=FixedSizes(), inputs=(port,), outputs=(port,)
    )
    values = (Value("pixels", "float32", shape, "input"), Value("rows", "float32", shape, "output"))
    call = Call("glue_0", "eye.glue_0", ("pixels",), ("rows",))
    interface = Interface((Parameter("pixels", "POSITIONAL_OR_KEYWORD", tensor, None),), tensor)
    encoder = replace(Function("eye", (call,), values, ("rows",), interface=interface), **changes)
    return Split((*split.segments, segment), (split.main, encoder))


def problem(split: Split) -> str | None:
    return split_problem(split) or language_model_problem(split, 16, 64)


@pytest.mark.parametrize("shape", [rows(1, 32), FixedSizes((1, 8))])
def test_rows_stand_on_the_second_axis_of_what_sessions_fill(shape):
    split = toys.split(1, shape)
    for name, other in (("input_ids", (1, 1, "T")), ("k_0", ("T", 1, 1, 4))):
        value = next(value for value in split.values if value.name == name)
        values = tuple(replace(v, shape=other) if v is value else v for v in split.values)
        moved = replace(split, functions=(replace(split.main, values=values),))
        assert moved.values != split.values
        assert problem(moved) == f"value {name} has no rows"


@pytest.mark.parametrize("shape", [rows(1, 32), FixedSizes((1, 8))])
def test_encoders_are_no_part_of_what_sessions_run(shape):
    split = toys.split(2, shape)
    both = with_encoder(split)
    assert problem(both) is None
    assert both.decoder == split
    assert split.decoder is split
    assert both.calls == split.calls


def test_functions_that_are_no_encoders_are_refused():
    split = toys.split(2, rows(1, 32))
    assert problem(with_encoder(split, interface=None)) == "an encoder has no interface, or it has states"
    kept = with_encoder(split, states=(State("pixels", "rows"),))
    assert language_model_problem(kept, 16, 64) == "an encoder has no interface, or it has states"
    both = with_encoder(split)
    calling = replace(split.calls[-1], callee="function", segment="eye")
    main = replace(split.main, calls=(*split.calls[:-1], calling))
    said = "the language model's own function has an interface or states, or calls others"
    assert language_model_problem(replace(both, functions=(main, both.functions[1])), 16, 64) == said
