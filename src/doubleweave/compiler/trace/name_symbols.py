"""Names and ranges of the symbols in a traced graph's sizes: one symbol a Dim.

It knows nothing of modules or segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.export import Dim

from doubleweave.compiler.graph.nodes import expression
from doubleweave.compiler.trace.dims import Leaf, axis_name
from doubleweave.errors import PolicyError
from doubleweave.ir.split import Range


def unify_dims(exported: torch.export.ExportedProgram, leaves: Sequence[Leaf]) -> None:
    """Let the sizes of one Dim be one symbol: torch keeps a symbol for each argument."""
    first: dict[str, Any] = {}
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = placeholders[len(placeholders) - len(leaves) :]  # the lifted weights and buffers come first
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, dim in leaf.axes.items():
            size = node.meta["val"].shape[axis]
            if not isinstance(dim, Dim) or hasattr(dim, "root") or isinstance(size, int):
                continue
            before = first.setdefault(dim.__name__, size)
            symbol, wanted = size.node.expr, before.node.expr
            if symbol != wanted and isinstance(symbol, sympy.Symbol):
                size.node.shape_env._set_replacement(symbol, wanted, f"both are {dim.__name__}")


def name_symbols(
    exported: torch.export.ExportedProgram, inputs: Sequence[fx.Node], leaves: Sequence[Leaf]
) -> tuple[dict[sympy.Symbol, str], tuple[Range, ...]]:
    """Names and ranges of the symbols of the inputs' sizes: a Dim's name, or that of the axis."""
    names: dict[sympy.Symbol, str] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            found = expression(size)
            dim: Any = leaf.axes.get(axis)
            is_derived = hasattr(dim, "root")
            if isinstance(found, sympy.Symbol) and found not in names:
                is_named = isinstance(dim, Dim) and not is_derived
                name = dim.__name__ if is_named else axis_name(leaf.path, axis)
                while name in names.values():
                    name += "_"
                names[found] = name
            elif is_derived and len(found.free_symbols) == 1:
                (symbol,) = found.free_symbols
                names.setdefault(symbol, dim.root.__name__)
    ranges = []
    least = _least(inputs, leaves)
    for symbol, name in names.items():
        bounds = exported.range_constraints[symbol]
        if not bounds.upper.is_Integer:
            raise PolicyError(
                f"dim {name!r} has no largest size, and a dynamic method is planned for one; give the axis a "
                "Dim(name, min=…, max=…)"
            )
        ranges.append(Range(name, least.get(symbol, int(bounds.lower)), int(bounds.upper)))
    return names, tuple(ranges)


def _least(inputs: Sequence[fx.Node], leaves: Sequence[Leaf]) -> dict[sympy.Symbol, int]:
    """The least size that each symbol's dims allow; torch itself assumes at least 2 of some."""
    least: dict[sympy.Symbol, int] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, dim in leaf.axes.items():
            low = getattr(getattr(dim, "root", dim), "min", None)
            symbols = expression(node.meta["val"].shape[axis]).free_symbols
            if isinstance(low, int) and len(symbols) == 1:
                (symbol,) = symbols
                least[symbol] = max(1, low, least.get(symbol, 1))
    return least
