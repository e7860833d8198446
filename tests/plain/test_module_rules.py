"""What a manifest may not say of a module, whatever its seal says: each rule by a split that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from doubleweave.ir.interface import Interface, Parameter
from doubleweave.ir.rules import split_problem
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
)
from doubleweave.ir.trees import Tree

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


def test_sizes_that_are_solved_from_expressions_are_no_fault():
    main = with_value(MAIN, "both", shape=("2*k + T",))
    assert split_problem(Split((SEGMENT,), (main, INNER))) is None
