"""The sizes of a named module's calls: checks against its rule, and example arguments to trace it over.

A call's sizes are numbers or symbols of its caller. This module knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim

from doubleweave.compiler.graph.nodes import expression
from doubleweave.compiler.policy import Match, Static
from doubleweave.compiler.trace.dims import Leaf, axis_name
from doubleweave.compiler.trace.export_flat import working_dims
from doubleweave.compiler.trace.flat_module import Flat
from doubleweave.compiler.trace.trace_data import Call, Trace
from doubleweave.errors import PolicyError
from doubleweave.ir.interface import Parameter
from doubleweave.ir.split import ROWS


@dataclass
class Variant:
    """A named module with the arguments of one or several calls, which one function serves."""

    name: str
    match: Match
    parameters: tuple[Parameter, ...]
    calls: list[Call] = field(default_factory=list)


def chunked_root(what: str, rule: Static, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """The whole module cut into chunks: the rows become "T", with the range that dynamic_shapes gives."""
    axes = chunk_axes(what, rule, leaves)
    bounds = []
    for leaf in leaves:
        if (axis := axes.get(leaf.path)) is None:
            continue
        size, dim = leaf.example.shape[axis], leaf.axes.get(axis)
        if dim is not None and not isinstance(dim, Dim):
            raise PolicyError(
                f"{what}: axis {axis} of {leaf.path} is cut into chunks, and needs a "
                "torch.export.Dim(name, min=…, max=…) in dynamic_shapes"
            )
        bounds.append((1, size) if dim is None else (dim.min, dim.max))
    low, high = max(b[0] for b in bounds), min(b[1] for b in bounds)
    return with_rows(leaves, axes, low, high)


def with_rows(leaves: Sequence[Leaf], axes: Mapping[str, int], low: int, high: int) -> tuple[Leaf, ...]:
    """The leaves with the dim "T" along their rows."""
    dim = Dim(ROWS, min=low, max=max(2, high))
    return tuple(
        replace(leaf, axes={**leaf.axes, axes[leaf.path]: dim}) if leaf.path in axes else leaf
        for leaf in leaves
    )


def chunk_axes(what: str, rule: Static, leaves: Sequence[Leaf]) -> dict[str, int]:
    """The axis of each tensor along which rows are cut, from the rule's chunk."""
    assert rule.chunk is not None
    ranks = {leaf.path: leaf.example.ndim for leaf in leaves}
    axes = {}
    for path, axis in rule.chunk.items():
        if path not in ranks:
            raise PolicyError(
                f"{what}: chunk names {path!r}, expected one of its tensors: {', '.join(ranks) or '(none)'}"
            )
        if type(axis) is not int or not -ranks[path] <= axis < ranks[path]:
            raise PolicyError(
                f"{what}: chunk={{{path!r}: {axis!r}}}, but {path} has {ranks[path]} axes, 0 to {ranks[path] - 1}"
            )
        axes[path] = axis % ranks[path]
    return axes


def check_clash(
    what: str,
    module: nn.Module,
    parameters: tuple[Parameter, ...],
    leaves: Sequence[Leaf],
    tensors: Sequence[Tensor],
) -> None:
    """Refuse one Dim for axes of different sizes, and say which dims would work."""
    seen: dict[str, tuple[Any, str]] = {}
    for leaf, tensor in zip(leaves, tensors, strict=True):
        for axis, dim in leaf.axes.items():
            if not isinstance(dim, Dim) or hasattr(dim, "root"):
                continue
            size, where = tensor.shape[axis], f"axis {axis} of {leaf.path}"
            before, place = seen.setdefault(dim.__name__, (size, where))
            if not are_equal(size, before):
                called = map(concrete, tensors)
                at_call = [
                    replace(leaf, example=example) for leaf, example in zip(leaves, called, strict=True)
                ]
                works = working_dims(Flat(module, parameters), at_call, has_clash=True)
                hint = f"; {works}" if works else ""
                raise PolicyError(
                    f"{what}: dim {dim.__name__!r} stands for {place}, which is {before}, and for {where}, which is "
                    f"{size}: one Dim means equal sizes, so give them two{hint}"
                )


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def are_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same for every value of their symbols."""
    return bool(sympy.simplify(expression(a) - expression(b)) == 0)


def free_leaves(variant: Variant, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """Dims for a module without any: axes are dynamic where the calls differ or vary themselves."""
    found: dict[tuple[int, int], Any] = {}
    result = []
    for i, leaf in enumerate(leaves):
        axes = {}
        for axis, example in enumerate(leaf.example.shape):
            sizes = [call.inputs[i].shape[axis] for call in variant.calls]
            if all(isinstance(size, int) and size == example for size in sizes):
                continue
            # Axes that are equal in every call are one dim.
            dim = next((dim for key, dim in found.items() if _always_equal(variant, key, (i, axis))), None)
            if dim is None:
                bounds = [call.bounds(size) for call, size in zip(variant.calls, sizes, strict=True)]
                lows, highs = zip(*bounds, strict=True)
                dim = Dim(axis_name(leaf.path, axis), min=min(lows), max=max(2, *highs))
            axes[axis] = found[i, axis] = dim
        result.append(Leaf(leaf.path, leaf.example, axes))
    return tuple(result)


def without_names(variant: Variant, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """The same axes without names, for torch to relate: the module may need one axis to be 2*k, or fixed."""
    axes = [(i, axis) for i, leaf in enumerate(leaves) for axis in leaf.axes]
    for call in variant.calls:
        # torch takes a 1 for a constant, so the example is a call in which no dynamic axis is 1.
        if all(_hint(call.inputs[i].shape[axis]) > 1 for i, axis in axes):
            return tuple(
                Leaf(
                    leaf.path, tensor, {n: Dim.AUTO(min=dim.min, max=dim.max) for n, dim in leaf.axes.items()}
                )
                for leaf, tensor in zip(leaves, call.inputs, strict=True)
            )
    raise PolicyError(
        f"{variant.name!r}: each of its calls has an axis of size 1 that varies; name its dims, "
        "Dynamic({argument: {axis: Dim(…)}})"
    )


def _always_equal(variant: Variant, a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two axes, each (input, axis), have one size in every call."""
    return all(
        are_equal(call.inputs[a[0]].shape[a[1]], call.inputs[b[0]].shape[b[1]]) for call in variant.calls
    )


def concrete(tensor: Tensor) -> Tensor:
    """Zeros of a fake tensor's example sizes."""
    return torch.zeros([_hint(size) for size in tensor.shape], dtype=tensor.dtype)


def check_dynamic_call(site: str, leaves: Sequence[Leaf], call: Call) -> None:
    """Raise PolicyError for a call with sizes outside the rule's dims."""
    for leaf, tensor in zip(leaves, call.inputs, strict=True):
        for axis, size in enumerate(tensor.shape):
            dim = leaf.axes.get(axis)
            low, high = call.bounds(size)
            found = f"{site}: axis {axis} of {leaf.path} is {f'{low} to {high}' if low != high else low}, and"
            if dim is None and not (isinstance(size, int) and size == _hint(leaf.example.shape[axis])):
                raise PolicyError(
                    f"{found} elsewhere {_hint(leaf.example.shape[axis])}, but its dims do not name that axis; add "
                    f'{{"{leaf.path}": {{{axis}: Dim(…)}}}}'
                )
            if isinstance(dim, Dim) and not dim.min <= low <= high <= dim.max:
                raise PolicyError(
                    f"{found} its dim {dim.__name__!r} allows {dim.min} to {dim.max}; widen the dim, or narrow the "
                    "caller's"
                )


def check_call(site: str, traced: Trace, call: Call) -> None:
    """Raise PolicyError for a call whose sizes do not relate to one another as the traced module needs."""
    placeholders = [node for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
    # The callee's symbols may have the names of the caller's.
    own = {symbol: sympy.Dummy(name, integer=True, positive=True) for symbol, name in traced.names.items()}
    rows = [
        (leaf, axis, expression(wanted).xreplace(own), wanted, size)
        for leaf, node, tensor in zip(traced.leaves, placeholders, call.inputs, strict=False)
        for axis, (wanted, size) in enumerate(zip(node.meta["val"].shape, tensor.shape, strict=True))
    ]
    bound: dict[Any, Any] = {}
    # Symbols first; expressions of them (2*k) follow, or give the one symbol they have.
    for leaf, axis, needed, wanted, size in sorted(rows, key=lambda row: not row[2].is_Symbol):
        found = expression(size)
        unknown = needed.free_symbols - set(bound)
        if len(unknown) == 1:
            (symbol,) = unknown
            try:
                solutions = sympy.solve(needed.xreplace(bound) - found, symbol)
            except NotImplementedError:
                solutions = [found] if needed == symbol else []
            if solutions:
                bound[symbol] = solutions[0]
        expected = needed.xreplace(bound)
        if sympy.simplify(expected - found) != 0:
            raise PolicyError(
                f"{site}: axis {axis} of {leaf.path} is {size}, expected {traced.size(wanted)} = {expected}: "
                "give its dims so that they serve every call"
            )
