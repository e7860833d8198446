"""The sizes of a function's symbols, from the tensors that it is given, and those of its values.

It knows nothing of calls or plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from doubleweave.errors import InputError
from doubleweave.ir.sizes import shape_of, solve, symbols, text
from doubleweave.ir.split import Function, Range, Value

_MOST_SIZE = 2**31 - 1  # of ExecuTorch's tensors


def sizes_of(value: Value, known: Mapping[str, int], name: str) -> tuple[int, ...]:
    """A value's shape in numbers. Raises InputError, which begins with `name`, where it is no shape for these sizes."""
    try:
        sizes = shape_of(value.shape, known)
        if all(0 <= size <= _MOST_SIZE for size in sizes):
            return sizes
    except (KeyError, ZeroDivisionError):
        pass
    given = ", ".join(f"{symbol} = {size}" for symbol, size in sorted(known.items())) or "any call"
    raise InputError(f"{name}, {value.name}: found shape {text(value.shape)}, which is no shape for {given}")


def symbols_of(function: Function, name: str, found: Sequence[tuple[str, Sequence[int]]]) -> dict[str, int]:
    """The sizes of a function's symbols for inputs of these dtypes and shapes.

    Raises InputError that names the input, its shape or dtype, and the allowed shapes.
    """
    known: dict[str, int] = {}
    ranges = {r.symbol: r for r in function.ranges}
    # Plain symbols first, whatever the order of the inputs: expressions such as 2*k + m follow from them.
    for is_plain in (True, False):
        for value, (dtype, sizes) in zip(function.inputs, found, strict=True):
            if dtype != value.dtype:
                raise InputError(f"{name}, {value.name}: found dtype {dtype}, expected {value.dtype}")
            if len(sizes) != len(value.shape):
                raise InputError(_refused(name, value, sizes, ranges))
            for size, number in zip(value.shape, sizes, strict=True):
                if (size in ranges or isinstance(size, int)) != is_plain:
                    continue
                try:
                    is_solved = solve(size, number, known)
                except ValueError:
                    raise InputError(
                        f"{_refused(name, value, sizes, ranges)}, from which {size} cannot be solved; call the "
                        "whole module, which gives every size"
                    ) from None
                if not is_solved:
                    given = ", ".join(f"{s} = {known[s]}" for s in sorted(symbols(size)) if s in known)
                    raise InputError(
                        _refused(name, value, sizes, ranges)
                        + (f", where {given} from what came before" if given else "")
                    )
                # A range may begin with another symbol, which a later input may give.
                for symbol, low, high in function.ranges:
                    least = known.get(low) if isinstance(low, str) else low
                    if symbol in known and least is not None and not least <= known[symbol] <= high:
                        raise InputError(
                            f"{_refused(name, value, sizes, ranges)}: {symbol} is {known[symbol]}"
                        )
    return known


def _refused(name: str, value: Value, sizes: Sequence[int], ranges: Mapping[str, Range]) -> str:
    used = sorted({symbol for size in value.shape for symbol in symbols(size)})
    bounds = ", ".join(f"{s} in {ranges[s].low}..{ranges[s].high}" for s in used if s in ranges)
    allowed = text(value.shape) + (f" with {bounds}" if bounds else "")
    return f"{name}, {value.name}: found shape {text(sizes)}, expected {allowed}"
