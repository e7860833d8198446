"""Symbols follow from the sizes of a call's inputs, or the inputs are refused."""

from __future__ import annotations

import pytest

from doubleweave.errors import InputError
from doubleweave.ir.split import Function, Range, Value
from doubleweave.schedule.symbols import symbols_of

RANGES = (Range("m", 1, 10), Range("k", 2, 8))


def inputs(*found, ranges=RANGES):
    return Function(
        "f", (), tuple(Value(name, "int64", shape, "input") for name, shape in found), (), tuple(ranges)
    )


@pytest.mark.parametrize(
    ("function", "shapes", "known"),
    [
        (inputs(("a", ("m", 3))), [(4, 3)], {"m": 4}),
        (inputs(("a", ("m", "k")), ("b", ("k", "m"))), [(4, 5), (5, 4)], {"m": 4, "k": 5}),
        # What an expression says may come before what its symbol is.
        (inputs(("a", ("2*m + 1",)), ("b", ("m",))), [(9,), (4,)], {"m": 4}),
        (inputs(("a", ("2*m + 1",))), [(9,)], {"m": 4}),
        (inputs(("a", ("m*k",)), ("b", ("m", "k"))), [(12,), (4, 3)], {"m": 4, "k": 3}),
    ],
)
def test_symbols_follow_from_the_inputs_sizes(function, shapes, known):
    assert symbols_of(function, "f", [("int64", shape) for shape in shapes]) == known


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (
            inputs(("a", ("m", 3))),
            [(4, 2)],
            r"f, a: found shape \[4, 2\], expected \[m, 3\] with m in 1\.\.10",
        ),
        (inputs(("a", ("m", 3))), [(11, 3)], r"expected \[m, 3\] with m in 1\.\.10: m is 11"),
        (inputs(("a", ("m", 3))), [(0, 3)], "m is 0"),
        (inputs(("a", ("m",))), [(4, 1)], r"found shape \[4, 1\], expected \[m\]"),
        (inputs(("a", ("m",))), [()], r"found shape \[\], expected \[m\]"),
        (
            inputs(("a", ("m",)), ("b", ("m",))),
            [(4,), (5,)],
            r"f, b: found shape \[5\], expected \[m\] with m in 1\.\.10, where m = 4 from what came before",
        ),
        (
            inputs(("a", ("m",)), ("b", ("2*m",))),
            [(4,), (7,)],
            r"f, b: found shape \[7\], expected \[2\*m\] with m in 1\.\.10, where m = 4",
        ),
        (inputs(("a", ("2*k",))), [(7,)], r"expected \[2\*k\] with k in 2\.\.8"),
        (inputs(("a", ("2*k",))), [(18,)], "k is 9"),
        (
            inputs(
                ("a", ("m",)),
                ("b", ("S",)),
                ranges=(Range("m", 1, 10), Range("S", "m", 20)),
            ),
            [(4,), (3,)],
            r"f, b: found shape \[3\], expected \[S\] with S in m\.\.20: S is 3",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(function, shapes, message):
    with pytest.raises(InputError, match=message):
        symbols_of(function, "f", [("int64", shape) for shape in shapes])


def test_another_dtype_is_refused():
    function = inputs(("a", ("m",)))
    with pytest.raises(InputError, match="f, a: found dtype float32, expected int64"):
        symbols_of(function, "f", [("float32", (4,))])
