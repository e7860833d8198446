"""The sizes that a named module is called with: whether its rule allows them, and what to trace it over.

It knows nothing of graphs; a call's sizes are numbers or symbols of its caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import Dim

from doubleweave.compiler.policy import Match
from doubleweave.compiler.policy import Static as StaticRule
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.export_flat import suggest
from doubleweave.compiler.trace.trace_data import Call as TracedCall
from doubleweave.compiler.trace.trace_data import Trace
from doubleweave.errors import PolicyError
from doubleweave.ir.interface import Parameter
from doubleweave.ir.split import ROWS


@dataclass
class Variant:
    """A named module as called in one way; several calls share it."""

    name: str
    match: Match
    parameters: tuple[Parameter, ...]
    calls: list[TracedCall] = field(default_factory=list)


def chunked_root(what: str, rule: StaticRule, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """The whole module cut into chunks: the rows become "T", with the range that dynamic_shapes gives."""
    axes = chunk_axes(what, rule, leaves)
    bounds = []
    for leaf in leaves:
        if leaf.path not in axes:
            continue
        size = leaf.example.shape[axes[leaf.path]]
        dim = leaf.axes.get(axes[leaf.path])
        if dim is not None and not isinstance(dim, Dim):
            raise PolicyError(
                f"{what}: axis {axes[leaf.path]} of {leaf.path} is cut into chunks, and needs a "
                "torch.export.Dim(name, min=…, max=…) in dynamic_shapes"
            )
        bounds.append((1, size) if dim is None else (dim.min, dim.max))
    low, high = max(b[0] for b in bounds), min(b[1] for b in bounds)
    return with_rows(leaves, axes, low, high)


def with_rows(leaves: Sequence[Leaf], axes: Mapping[str, int], low: int, high: int) -> tuple[Leaf, ...]:
    dim = Dim(ROWS, min=low, max=max(2, high))
    return tuple(
        Leaf(leaf.path, leaf.example, {**leaf.axes, axes[leaf.path]: dim}) if leaf.path in axes else leaf
        for leaf in leaves
    )


def chunk_axes(what: str, rule: StaticRule, leaves: Sequence[Leaf]) -> dict[str, int]:
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
    shapes: Sequence[Any],
) -> None:
    """Refuse one Dim for axes of different sizes, and say which dims would work."""
    seen: dict[str, tuple[Any, str]] = {}
    for leaf, shape in zip(leaves, shapes, strict=True):
        for axis, dim in leaf.axes.items():
            if not isinstance(dim, Dim) or hasattr(dim, "root"):
                continue
            size, where = shape[axis], f"axis {axis} of {leaf.path}"
            before, place = seen.setdefault(dim.__name__, (size, where))
            if not are_equal(size, before):
                tensors = [
                    torch.zeros([_hint(s) for s in found], dtype=leaf.example.dtype)
                    for leaf, found in zip(leaves, shapes, strict=True)
                ]
                works = suggest(module, parameters, tensors)
                hint = f"; dims that would work: {works}" if works else ""
                raise PolicyError(
                    f"{what}: dim {dim.__name__!r} stands for {place}, which is {before}, and for {where}, which is "
                    f"{size}: one Dim means equal sizes, so give them two{hint}"
                )


def _expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def are_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    known = a if not isinstance(a, int) else b
    difference = sympy.simplify(_expression(a) - _expression(b))
    return difference == 0 or bool(
        known.node.shape_env.evaluate_static_only(sympy.Eq(_expression(a), _expression(b)))
        if hasattr(known.node.shape_env, "evaluate_static_only")
        else False
    )


def free_leaves(variant: Variant, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """Dims for a module without any: axes are dynamic where the calls differ or vary themselves."""
    dynamic = [
        {
            axis
            for axis in range(leaf.example.ndim)
            if any(
                not isinstance(call.inputs[i].shape[axis], int)
                or call.inputs[i].shape[axis] != leaf.example.shape[axis]
                for call in variant.calls
            )
        }
        for i, leaf in enumerate(leaves)
    ]
    # Axes that are equal in every call are one dim.
    classes: list[tuple[int, int]] = []
    found: dict[tuple[int, int], Any] = {}
    for i, axes in enumerate(dynamic):
        for axis in sorted(axes):
            like = next((key for key in classes if _always_equal(variant, key, (i, axis))), None)
            if like is None:
                bounds = [call.bounds(call.inputs[i].shape[axis]) for call in variant.calls]
                name = "".join(c if c.isalnum() else "_" for c in leaves[i].path) + f"_{axis}"
                found[i, axis] = Dim(name, min=min(b[0] for b in bounds), max=max(2, *(b[1] for b in bounds)))
                classes.append((i, axis))
            else:
                found[i, axis] = found[like]
    return tuple(
        Leaf(leaf.path, leaf.example, {axis: found[i, axis] for axis in sorted(axes)})
        for i, (leaf, axes) in enumerate(zip(leaves, dynamic, strict=True))
    )


def without_names(variant: Variant, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """The same axes, left for torch to relate: what it computes may need 2*k, or one of them fixed."""
    # torch takes a 1 for a constant: show it a call in which no dynamic axis is 1.
    shown = next(
        (
            call
            for call in variant.calls
            if all(
                _hint(call.inputs[i].shape[axis]) > 1 for i, leaf in enumerate(leaves) for axis in leaf.axes
            )
        ),
        None,
    )
    if shown is None:
        raise PolicyError(
            f"{variant.name!r}: each of its calls has an axis of size 1 that varies; name its dims, "
            "Dynamic({argument: {axis: Dim(…)}})"
        )
    return tuple(
        Leaf(
            leaf.path,
            shown.inputs[i],
            {axis: Dim.AUTO(min=dim.min, max=dim.max) for axis, dim in leaf.axes.items()},
        )
        for i, leaf in enumerate(leaves)
    )


def _always_equal(variant: Variant, a: tuple[int, int], b: tuple[int, int]) -> bool:
    return all(
        are_equal(call.inputs[a[0]].shape[a[1]], call.inputs[b[0]].shape[b[1]]) for call in variant.calls
    )


def concrete(tensor: Tensor) -> Tensor:
    return torch.zeros([_hint(size) for size in tensor.shape], dtype=tensor.dtype)


def check_dynamic_call(site: str, leaves: Sequence[Leaf], call: TracedCall) -> None:
    """Whether a call's sizes are those that the rule's dims allow."""
    for leaf, tensor in zip(leaves, call.inputs, strict=True):
        for axis, size in enumerate(tensor.shape):
            dim = leaf.axes.get(axis)
            low, high = call.bounds(size)
            if dim is None:
                if not isinstance(size, int) or size != _hint(leaf.example.shape[axis]):
                    sizes = f"{low} to {high}" if low != high else str(low)
                    raise PolicyError(
                        f"{site}: axis {axis} of {leaf.path} is {sizes}, and elsewhere "
                        f"{_hint(leaf.example.shape[axis])}, but its dims do not name that axis; add "
                        f'{{"{leaf.path}": {{{axis}: Dim(…)}}}}'
                    )
            elif isinstance(dim, Dim) and not dim.min <= low <= high <= dim.max:
                sizes = f"{low} to {high}" if low != high else str(low)
                raise PolicyError(
                    f"{site}: axis {axis} of {leaf.path} is {sizes}, and its dim {dim.__name__!r} allows {dim.min} to "
                    f"{dim.max}; widen the dim, or narrow the caller's"
                )


def check_call(site: str, traced: Trace, call: TracedCall) -> None:
    """Whether a call's sizes stand to one another as the traced module needs it."""
    placeholders = [node for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
    # The callee's symbols may have the names of the caller's.
    own = {symbol: sympy.Dummy(name, integer=True, positive=True) for symbol, name in traced.names.items()}
    rows = [
        (leaf, axis, _expression(wanted).xreplace(own), wanted, size)
        for leaf, node, tensor in zip(traced.leaves, placeholders, call.inputs, strict=False)
        for axis, (wanted, size) in enumerate(zip(node.meta["val"].shape, tensor.shape, strict=True))
    ]
    bound: dict[Any, Any] = {}
    # Symbols first; expressions of them (2*k) follow, or give the one symbol they have.
    for leaf, axis, expression, wanted, size in sorted(rows, key=lambda row: not row[2].is_Symbol):
        found = _expression(size)
        unknown = expression.free_symbols - set(bound)
        if len(unknown) == 1:
            (symbol,) = unknown
            try:
                solutions = sympy.solve(expression.xreplace(bound) - found, symbol)
            except NotImplementedError:
                solutions = [found] if expression == symbol else []
            if solutions:
                bound[symbol] = solutions[0]
        expected = expression.xreplace(bound)
        if sympy.simplify(expected - found) != 0:
            raise PolicyError(
                f"{site}: axis {axis} of {leaf.path} is {size}, expected {traced.size(wanted)} = {expected}: "
                "give its dims so that they serve every call"
            )
