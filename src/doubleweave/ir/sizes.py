"""Sizes in shapes: numbers, symbols ("T") and expressions of symbols ("m + 2*k").

Evaluated without torch or sympy, from a small grammar: integers, names, + - * // % **, Max, Min, Mod and the
division functions that torch's symbolic shapes print. It knows nothing of tensors.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

Size = int | str
Shape = tuple[Size, ...]

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
# Sizes come from a manifest, which anybody may have written: evaluating them must end soon and stay small.
_LARGEST = 2**63
_MOST_POWER = 8
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "PowByNatural": operator.pow,
}


_Function = Callable[[Mapping[str, int]], int]  # a size's number, from the values of its symbols


@cache
def _parsed(text: str) -> tuple[_Function, frozenset[str]]:
    """An expression and its symbols. Raises ValueError for text that is no size expression."""
    found: set[str] = set()
    try:
        return _function(ast.parse(text, mode="eval").body, found), frozenset(found)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text[:60]!r} is no size expression") from None


def _function(node: ast.expr, found: set[str]) -> _Function:
    """The function of an expression; adds its symbols to `found`."""
    apply: Callable[..., int]
    match node:
        case ast.Constant(value=number) if type(number) is int and abs(number) <= _LARGEST:
            return lambda values: number
        case ast.Name(id=name):
            found.add(name)
            return operator.itemgetter(name)
        case (
            ast.BinOp(op=ast.Pow(), right=right) | ast.Call(func=ast.Name(id="PowByNatural"), args=[_, right])
        ) if not (isinstance(right, ast.Constant) and right.value in range(_MOST_POWER + 1)):
            raise ValueError(f"{ast.unparse(node)!r} is no size expression")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            apply, parts = _BINARY[type(op)], [left, right]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            apply, parts = operator.neg, [operand]
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _FUNCTIONS and (
            len(parts) == 2 or (len(parts) > 2 and name in ("Max", "Min"))
        ):
            apply = _FUNCTIONS[name]
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is no size expression")
    functions = [_function(part, found) for part in parts]
    return lambda values: apply(*(function(values) for function in functions))


def symbols(size: Size) -> frozenset[str]:
    """The symbols in a size. Raises ValueError for text that is no size expression."""
    return frozenset() if isinstance(size, int) else _parsed(size)[1]


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """The number a size has for these values of its symbols; KeyError for a symbol without one."""
    return size if isinstance(size, int) else _parsed(size)[0](values)


def shape_of(shape: Shape, values: Mapping[str, int]) -> tuple[int, ...]:
    """A shape in numbers."""
    return tuple(evaluate(size, values) for size in shape)


def solve(size: Size, found: int, values: dict[str, int]) -> bool:
    """Solve `size` = `found` for the symbol of `size` that has no value yet, and add its value to `values`.

    An expression is solved if it is linear in that symbol, such as 2*k + 1. Returns False where no whole number solves
    it, or where all symbols are known and the size is another; raises ValueError for several unknown symbols.
    """
    unknown = [name for name in sorted(symbols(size)) if name not in values]
    if len(unknown) > 1:
        raise ValueError(f"{size!r} has several unknown symbols")
    try:
        return _solve(size, found, values, unknown[0]) if unknown else evaluate(size, values) == found
    except ZeroDivisionError:
        return False


def _solve(size: Size, found: int, values: dict[str, int], name: str) -> bool:
    # Two points give a line; whether the size is one is checked at the solution.
    zero, one = (evaluate(size, {**values, name: number}) for number in (0, 1))
    if one == zero:
        return False
    number = (found - zero) // (one - zero)
    if evaluate(size, {**values, name: number}) != found:
        return False
    values[name] = number
    return True


def text(shape: Iterable[Any]) -> str:
    """A shape as people write it: "[3, m, 2*k]"."""
    return "[" + ", ".join(map(str, shape)) + "]"
