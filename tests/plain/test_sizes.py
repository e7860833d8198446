"""Size expressions: the same numbers as Python's, and nothing but sizes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubleweave.ir.sizes import evaluate, shape_of, solve, symbols, text

NAMES = ("T", "S", "m", "k", "x_0")
# What torch's symbolic shapes print.
FUNCTIONS = {
    "Max": max,
    "Min": min,
    "Mod": lambda a, b: a % b,
    "PythonMod": lambda a, b: a % b,
    "FloorDiv": lambda a, b: a // b,
    "CleanDiv": lambda a, b: a // b,
    "PowByNatural": lambda a, b: a**b,
}
NUMBERS = st.integers(0, 50)
VALUES = st.fixed_dictionaries({name: st.integers(-20, 200) for name in NAMES})


def compound(inner):
    pair = st.tuples(inner, inner)
    binary = st.tuples(st.sampled_from(["+", "-", "*", "//", "%"]), pair)
    power = st.tuples(inner, st.integers(0, 3))
    return st.one_of(
        binary.map(lambda item: f"({item[1][0]} {item[0]} {item[1][1]})"),
        # Without parentheses: what binds first is up to the parser.
        binary.map(lambda item: f"{item[1][0]}{item[0]}{item[1][1]}"),
        inner.map(lambda item: f"-({item})"),
        power.map(lambda item: f"({item[0]})**{item[1]}"),
        power.map(lambda item: f"PowByNatural({item[0]}, {item[1]})"),
        st.tuples(st.sampled_from(["Mod", "PythonMod", "FloorDiv", "CleanDiv"]), pair).map(
            lambda item: f"{item[0]}({item[1][0]}, {item[1][1]})"
        ),
        st.tuples(st.sampled_from(["Max", "Min"]), st.lists(inner, min_size=2, max_size=4)).map(
            lambda item: f"{item[0]}({', '.join(item[1])})"
        ),
    )


EXPRESSIONS = st.recursive(st.one_of(NUMBERS.map(str), st.sampled_from(NAMES)), compound, max_leaves=8)


def by_python(expression, values):
    return eval(expression, {"__builtins__": {}, **FUNCTIONS, **values})


@given(EXPRESSIONS, VALUES)
def test_an_expression_has_the_value_that_python_gives_it(expression, values):
    try:
        wanted = by_python(expression, values)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression, values)
        return
    assert evaluate(expression, values) == wanted
    assert shape_of((3, expression), values) == (3, wanted)


@given(EXPRESSIONS, VALUES)
def test_symbols_are_those_that_the_value_needs(expression, values):
    found = symbols(expression)
    assert found <= set(NAMES)
    assert all((name in expression) == (name in found) for name in ("m", "k", "x_0"))
    for name in found:
        with pytest.raises((KeyError, ZeroDivisionError)):
            evaluate(expression, {n: v for n, v in values.items() if n != name})


@given(NUMBERS)
def test_numbers_are_sizes(number):
    assert evaluate(number, {}) == number
    assert symbols(number) == frozenset()


REFUSED = [
    "T.real",
    "T[0]",
    "T()",
    "max(T, 1)",
    "abs(T)",
    "Max",
    "int('3')",
    "'T'",
    "f'{T}'",
    "b'T'",
    "1.5",
    "1j",
    "None",
    "...",
    "T / 2",
    "T @ S",
    "T << 2",
    "T >> 1",
    "T | 1",
    "T & 1",
    "T ^ 1",
    "~T",
    "+T",
    "not T",
    "T < S",
    "T == S",
    "T and S",
    "T if S else 1",
    "[T]",
    "(T, S)",
    "{T}",
    "{T: S}",
    "[T for T in S]",
    "(T for T in S)",
    "lambda: T",
    "(T := 3)",
    "Max(*T)",
    "Max.__call__(T, S)",
    "Max(T, S)(1)",
    "T +",
    "9**9**9**9",
    "(T**8)**9",
    "T**S",
    "T**-1",
    "PowByNatural(T, 99999)",
    f"T*{2**64}",
    "",
    " ",
    "T; S",
    "import os",
    "T = 3",
    "await T",
    "yield T",
    "\ud800",
]


@pytest.mark.parametrize("expression", REFUSED)
def test_anything_else_is_refused(expression):
    values = dict.fromkeys(NAMES, 7)
    if expression == "Max":  # a symbol as good as any, which has no value
        with pytest.raises(KeyError):
            evaluate(expression, values)
        return
    with pytest.raises(ValueError, match=r"is no size expression|surrogates"):
        symbols(expression)
    with pytest.raises((ValueError, SyntaxError)):
        evaluate(expression, values)


@pytest.mark.parametrize(
    "attempt",
    [
        "__import__('pathlib').Path({path!r}).touch()",
        "open({path!r}, 'w')",
        "().__class__.__base__.__subclasses__()",
        "Max(1, open({path!r}, 'w'))",
        "1 + exec('open({path!r}, \"w\")')",
        "[open({path!r}, 'w') for T in (1,)][0]",
        "T if open({path!r}, 'w') else S",
        "(lambda: open({path!r}, 'w'))()",
        "Max(1, 2, key=lambda n: open({path!r}, 'w'))",
    ],
)
def test_nothing_is_ever_executed(attempt, tmp_path):
    path = tmp_path / "written"
    expression = attempt.format(path=str(path))
    with pytest.raises((ValueError, SyntaxError)):
        symbols(expression)
    for use in (lambda: evaluate(expression, {"T": 1}), lambda: solve(expression, 1, {})):
        with contextlib.suppress(Exception):
            use()
    assert not path.exists()


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(expression):
    try:
        found = symbols(expression)
    except ValueError:
        return
    try:
        number = evaluate(expression, dict.fromkeys(found, 3))
    except (ZeroDivisionError, TypeError, OverflowError):
        return
    assert number == by_python(expression.strip(), dict.fromkeys(found, 3))


@given(st.integers(-9, 9).filter(bool), st.integers(-50, 50), st.integers(0, 500), st.sampled_from(NAMES))
def test_a_linear_expression_is_solved(factor, offset, number, name):
    expression = f"{factor}*{name} + {offset}" if offset >= 0 else f"{factor}*{name} - {-offset}"
    values = {}
    assert solve(expression, factor * number + offset, values)
    assert values == {name: number}
    if abs(factor) > 1:
        values = {}
        assert not solve(expression, factor * number + offset + 1, values)
        assert values == {}


@given(EXPRESSIONS, st.integers(-10, 300), VALUES)
def test_what_is_solved_is_a_solution(expression, found, values):
    unknown = symbols(expression)
    known = {name: values[name] for name in sorted(unknown)[1:]}
    before = dict(known)
    if solve(expression, found, known):
        assert evaluate(expression, known) == found
        assert before.items() <= known.items()
    else:
        assert known == before


def test_solving_knows_numbers_symbols_and_what_is_known():
    values = {}
    assert solve(3, 3, values)
    assert not solve(3, 4, values)
    assert solve("T", 5, values)
    assert values == {"T": 5}
    assert solve("T", 5, values)
    assert not solve("T", 6, values)
    assert solve("T + S", 9, values)
    assert values == {"T": 5, "S": 4}
    assert not solve("T*S", 21, values)
    assert not solve("m**2", 9, values)
    assert not solve("0*m", 9, values)
    assert not solve("T//(S - 4)", 9, values)  # 5 // 0
    with pytest.raises(ValueError, match=r"'m \+ k' has several unknown symbols"):
        solve("m + k", 3, values)


def test_a_symbol_without_a_value_is_an_error():
    with pytest.raises(KeyError, match="S"):
        evaluate("T + S", {"T": 1})


def test_shapes():
    assert shape_of(("T", 4, "2*T + 1"), {"T": 3}) == (3, 4, 7)
    assert text((3, "m", "2*k")) == "[3, m, 2*k]"
    assert text(()) == "[]"


@pytest.mark.parametrize("expression", ["True", "T + False"])
def test_booleans_are_refused(expression):
    with pytest.raises(ValueError, match="is no size expression"):
        symbols(expression)


def test_keywords_are_refused():
    with pytest.raises(ValueError, match="is no size expression"):
        symbols("Max(1, 2, key=T)")
    with pytest.raises(ValueError, match="is no size expression"):
        evaluate("Max(1, 2, key=T)", {"T": 1})


@pytest.mark.parametrize("expression", ["Max(T)", "Mod(T)", "FloorDiv(T, 2, 3)", "PowByNatural(2)"])
def test_functions_of_too_few_or_too_many_sizes_are_refused(expression):
    with pytest.raises(ValueError, match="is no size expression"):
        evaluate(expression, {"T": 1})


def test_a_division_by_the_unknown_is_not_solved():
    assert not solve("8 // T", 3, {})


def test_an_expression_that_is_too_deep_is_refused():
    with pytest.raises(ValueError, match="is no size expression"):
        symbols("-" * 5_000 + "T")
