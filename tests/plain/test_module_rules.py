"""What a manifest may not say of a module, whatever its seal says: each rule by a split that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import toys
from doubleweave.errors import InputError
from doubleweave.ir.interface import Interface, Parameter
from doubleweave.ir.rules import language_model_problem, split_problem
from doubleweave.ir.split import (
    Call,
    FixedSizes,
    Function,
    Port,
    Range,
    Segment,
    Split,
    State,
    Value,
    rows,
)
from doubleweave.ir.trees import Tree
from doubleweave.schedule.symbols import sizes_of, symbols_of

TENSOR = Tree("tensor")
ROWS_OF_4 = ("float32", ("T", 4))
SEGMENT = Segment(
    "fc",
    "cpu",
    "xnnpack",
    FixedSizes((1, 8)),
    (Port("x", *ROWS_OF_4), Port("total", "float32", (4,))),
    (Port("y", *ROWS_OF_4), Port("next", "float32", (4,))),
    "fc",
)
INNER = Function(
    "inner",
    (Call("fc", "fc", ("x", "total"), ("y", "next")),),
    (
        Value("x", *ROWS_OF_4, "input"),
        Value("total", "float32", (4,), "state"),
        Value("y", *ROWS_OF_4, "output"),
        Value("next", "float32", (4,), "chunk"),
    ),
    ("y",),
    (Range("T", 1, 64),),
    (State("total", "next"),),
    Interface((Parameter("x", "POSITIONAL_OR_KEYWORD", TENSOR, None),), TENSOR),
)
MAIN = Function(
    "",
    (Call("inner", "inner", ("x",), ("y",), callee="function"),),
    (
        Value("x", *ROWS_OF_4, "input"),
        Value("both", "float32", ("T + k",), "input"),
        Value("y", *ROWS_OF_4, "output"),
    ),
    ("y",),
    (Range("T", 1, 64), Range("k", 0, 8)),
    (),
    Interface(tuple(Parameter(name, "POSITIONAL_OR_KEYWORD", TENSOR, None) for name in "xy"), TENSOR),
)


def with_value(function: Function, name: str, **changes: Any) -> Function:
    values = [replace(value, **changes) if value.name == name else value for value in function.values]
    return replace(function, values=tuple(values))


def with_sizes(*sizes: int) -> Segment:
    return replace(SEGMENT, shape=FixedSizes(sizes))


def test_the_whole_one_breaks_none():
    assert split_problem(Split((SEGMENT,), (MAIN, INNER))) is None


@pytest.mark.parametrize(
    ("main", "inner", "segment", "problem"),
    [
        (
            replace(MAIN, outputs=("y", "y")),
            INNER,
            SEGMENT,
            "another number of inputs or outputs than its interf",
        ),
        (
            with_value(MAIN, "both", shape=("k + m",)),
            INNER,
            SEGMENT,
            "input both has a size that cannot be solved",
        ),
        (
            replace(MAIN, ranges=MAIN.ranges[:1]),
            INNER,
            SEGMENT,
            "input both has a size that cannot be solved",
        ),
        (with_value(MAIN, "y", shape=("T", "junk")), INNER, SEGMENT, "value y has a size that nothing gives"),
        (
            with_value(MAIN, "both", shape=(3,)),
            with_value(INNER, "y", shape=("T", "k")),
            SEGMENT,
            "value y has a size that nothing gives",
        ),
        (MAIN, with_value(INNER, "total", shape=("T",)), SEGMENT, "state total has no fixed size"),
        (
            MAIN,
            with_value(INNER, "next", dtype="int64"),
            SEGMENT,
            "state total becomes another kind of tensor",
        ),
        (
            MAIN,
            with_value(INNER, "x", shape=("T", 2, 2)),
            SEGMENT,
            "call inner takes x for another kind of tensor",
        ),
        (
            MAIN,
            with_value(INNER, "y", dtype="int32"),
            SEGMENT,
            "call inner takes y for another kind of tensor",
        ),
        (
            MAIN,
            INNER,
            replace(SEGMENT, inputs=(Port("x", "float32", ("T",)), SEGMENT.inputs[1])),
            "call fc takes x for another kind of tensor",
        ),
        (
            MAIN,
            INNER,
            replace(SEGMENT, inputs=(Port("x", "float32", (8, 4)), SEGMENT.inputs[1])),
            "segment fc has fixed numbers of rows, and no input with rows",
        ),
        (MAIN, INNER, with_sizes(4, 8), "segment fc changes a state in chunks, and takes no single row"),
    ],
)
def test_a_rule_that_is_broken(main, inner, segment, problem):
    assert problem in (split_problem(Split((segment,), (main, inner))) or "none")


def test_a_nested_module_without_a_name_is_not_the_whole_one():
    nameless = replace(MAIN, calls=(replace(MAIN.calls[0], segment=""),))
    assert (
        split_problem(Split((SEGMENT,), (nameless, replace(INNER, name="")))) == "the name '' is there twice"
    )


def test_sizes_that_are_solved_from_expressions_are_no_fault():
    main = with_value(MAIN, "both", shape=("2*k + T",))
    assert split_problem(Split((SEGMENT,), (main, INNER))) is None


RANGES = (Range("T", 1, 64), Range("k", 0, 8))


def function(*inputs: Value, result: Any = ("T",), ranges: Any = RANGES) -> Function:
    values = (*inputs, Value("y", "float32", result, "output"))
    return Function("f", (), values, ("y",), ranges)


def an_input(name: str, *shape: Any) -> Value:
    return Value(name, "float32", shape, "input")


def found(*shapes: Any) -> Any:
    return [("float32", shape) for shape in shapes]


def test_a_range_may_begin_with_a_symbol_that_a_later_input_gives():
    ranges = (Range("T", 1, 64), Range("S", "T", 64))
    cached_first = function(an_input("k", "S"), an_input("q", "T"), ranges=ranges)
    assert symbols_of(cached_first, "f", found((9,), (3,))) == {"S": 9, "T": 3}
    with pytest.raises(InputError, match=r"f, q: found shape \[12\], expected \[T\] with T in 1..64: S is 9"):
        symbols_of(cached_first, "f", found((9,), (12,)))


def test_sizes_that_one_input_alone_does_not_give():
    with pytest.raises(
        InputError, match=r"expected \[T \+ k\] .*, from which T \+ k cannot be solved; call the"
    ):
        symbols_of(function(an_input("x", "T + k")), "f", found((9,)))


@pytest.mark.parametrize("size", ["T//0", "T % (k - 2)", "T - 70", "T**8", "m"])
def test_a_size_that_no_tensor_can_have(size):
    value = function(result=(size,)).value("y")
    with pytest.raises(InputError, match=r"f, y: found shape \[.*\], which is no shape for T = 64, k = 2"):
        sizes_of(value, {"T": 64, "k": 2}, "f")


def test_a_language_model_that_runs_row_by_row_alone():
    split = toys.split(2, rows(1, 8))
    each_row = replace(split, segments=tuple(replace(s, each_row=True) for s in split.segments))
    assert language_model_problem(split, 16, 64) is None
    assert language_model_problem(each_row, 16, 64) == "no call takes whole chunks"
