"""The sizes of a function's symbols, from the tensors that it is given. It knows nothing of calls or plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from doubleweave.errors import InputError
from doubleweave.ir.sizes import evaluate, solve, symbols, text
from doubleweave.ir.split import Function, Range, Value


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
                if not solve(size, number, known):
                    given = ", ".join(f"{s} = {known[s]}" for s in sorted(symbols(size)) if s in known)
                    raise InputError(
                        _refused(name, value, sizes, ranges)
                        + (f", where {given} from what came before" if given else "")
                    )
                for symbol in symbols(size):
                    _, low, high = ranges[symbol]
                    if not evaluate(low, known) <= known[symbol] <= high:
                        raise InputError(
                            f"{_refused(name, value, sizes, ranges)}: {symbol} is {known[symbol]}"
                        )
    return known


def _refused(name: str, value: Value, sizes: Sequence[int], ranges: Mapping[str, Range]) -> str:
    used = sorted({symbol for size in value.shape for symbol in symbols(size)})
    bounds = ", ".join(f"{s} in {ranges[s][1]}..{ranges[s][2]}" for s in used)
    allowed = text(value.shape) + (f" with {bounds}" if bounds else "")
    return f"{name}, {value.name}: found shape {text(sizes)}, expected {allowed}"
