"""Show that the rows of a segment do not depend on one another, so that it may run chunk by chunk.

First from the graph: the axis of the rows is followed through every operator, and an operator that mixes rows is
a reason to refuse. Then in numbers: the segment over all rows at once against the same rows chunk by chunk, the
last chunk padded. A segment with state is checked in numbers alone, in order and never padded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from doubleweave.errors import SplitError
from doubleweave.ir import ROWS, Port
from doubleweave.sizes import shape_of

PROVEN = "shown from the graph, and checked in numbers"
CHECKED = "checked in numbers"
_TOLERANCE = 1e-4

aten = torch.ops.aten

Axis = int | None  # the axis of the rows; None: a tensor without rows


class _MixesRows(Exception):
    """An operator makes rows depend on one another, or on how many there are."""


class _Unknown(Exception):
    """An operator that this module does not know."""


def check(
    name: str,
    graph_module: fx.GraphModule,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    sizes: Sequence[int],
    are_states: Sequence[bool],
    are_updates: Sequence[bool],
) -> str:
    """PROVEN or CHECKED; raises SplitError where rows are not independent.

    `are_states` and `are_updates` mark the inputs and outputs that are a state before and after.
    """
    for port, is_update in zip(outputs, are_updates, strict=True):
        if port.shape.count(ROWS) != 1 and not is_update:
            raise SplitError(
                f"{name!r}: its result {port.name} has shape {list(port.shape)}, expected one axis of {ROWS} rows, as "
                "many as go in: it cannot run chunk by chunk; make it Dynamic"
            )
    has_state = any(are_states) or any(are_updates)
    proof = CHECKED
    if has_state:
        if 1 not in sizes:
            raise SplitError(
                f"{name!r}: has state, which padding must not reach, so that chunks must add up exactly: expected 1 "
                f"among its sizes, found {', '.join(map(str, sizes))}"
            )
    else:
        proof = _prove(name, graph_module, inputs, outputs)
    problem = _compare(graph_module, inputs, outputs, sizes, are_states, are_updates)
    if problem is not None:
        raise SplitError(
            f"{name!r}: chunk by chunk it gives other numbers than at once ({problem}): its rows depend on one "
            "another; make it Dynamic"
        )
    return proof


def _prove(name: str, graph_module: fx.GraphModule, inputs: Sequence[Port], outputs: Sequence[Port]) -> str:
    rows: dict[fx.Node, Axis] = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, port in zip(placeholders, inputs, strict=True):
        rows[node] = port.shape.index(ROWS) if ROWS in port.shape else None
    symbol = next(node.meta["val"].shape[axis].node.expr for node, axis in rows.items() if axis is not None)
    follow = _Follower(rows, symbol)
    try:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                rows[node] = None
            elif node.op == "call_function":
                follow.node(node)
    except _Unknown:
        return CHECKED
    except _MixesRows as error:
        raise SplitError(
            f"{name!r}: its rows depend on one another ({error}), so it cannot be cut there; cut another axis, or make "
            "it Dynamic"
        ) from None
    return PROVEN


class _Follower:
    """Follows the axis of the rows through a graph."""

    def __init__(self, rows: dict[fx.Node, Axis], symbol: Any) -> None:
        self.rows = rows
        self.symbol = symbol

    def node(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self.rows[node] = self.rows[source]
            return
        if not isinstance(value, (Tensor, tuple, list)):
            return
        tensors = [source for source in node.all_input_nodes if source in self.rows]
        if all(self.rows[source] is None for source in tensors):
            first = value if isinstance(value, Tensor) else value[0]
            if any(self._has_rows(size) for size in first.shape):
                raise _MixesRows(f"{_name(node)} is made from the number of rows")
            self.rows[node] = None
            return
        rule = _RULES.get(node.target)
        if rule is None:
            is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            if not is_pointwise:
                raise _Unknown
            rule = _pointwise
        self.rows[node] = rule(self, node)

    def _has_rows(self, size: Any) -> bool:
        return not isinstance(size, int) and self.symbol in size.node.expr.free_symbols

    def axis(self, node: Any) -> Axis:
        return self.rows.get(node) if isinstance(node, fx.Node) else None

    def rank(self, node: Any) -> int:
        return len(node.meta["val"].shape)


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _pointwise(follow: _Follower, node: fx.Node) -> Axis:
    value: Any = node.meta["val"]
    found: set[int] = {
        axis + value.ndim - follow.rank(source)
        for source in node.all_input_nodes
        if (axis := follow.axis(source)) is not None
    }
    if len(found) > 1:
        raise _MixesRows(f"{_name(node)} combines rows with other rows")
    return found.pop()


def _same(follow: _Follower, node: fx.Node) -> Axis:
    return follow.axis(node.args[0])


def _others_free(follow: _Follower, node: fx.Node, first: Any) -> None:
    if any(follow.axis(other) is not None for other in node.all_input_nodes if other is not first):
        raise _MixesRows(f"{_name(node)} uses rows as weights")


def _linear(follow: _Follower, node: fx.Node) -> Axis:
    _others_free(follow, node, node.args[0])
    axis = follow.axis(node.args[0])
    if axis == follow.rank(node.args[0]) - 1:
        raise _MixesRows(f"{_name(node)} adds up along the rows")
    return axis


def _addmm(follow: _Follower, node: fx.Node) -> Axis:
    _others_free(follow, node, node.args[1])
    if follow.axis(node.args[1]) != 0:
        raise _MixesRows(f"{_name(node)} adds up along the rows")
    return 0


def _matmul(follow: _Follower, node: fx.Node) -> Axis:
    left, right = node.args[:2]
    a, b = follow.axis(left), follow.axis(right)
    value: Any = node.meta["val"]
    left_rank, right_rank = follow.rank(left), follow.rank(right)
    if min(left_rank, right_rank) < 2:
        raise _Unknown
    from_end = {axis - rank for axis, rank in ((a, left_rank), (b, right_rank)) if axis is not None}
    if len(from_end) == 1 and max(from_end) < -2:
        return int(value.ndim + from_end.pop())  # a batch of products
    if b is None and a == left_rank - 2:
        return int(value.ndim - 2)
    if a is None and b == right_rank - 1:
        return int(value.ndim - 1)
    raise _MixesRows(f"{_name(node)} adds up along the rows, or combines each with each")


def _norm(follow: _Follower, node: fx.Node) -> Axis:
    _others_free(follow, node, node.args[0])
    axis = follow.axis(node.args[0])
    normalized: Any = node.args[1]
    if axis is not None and axis >= follow.rank(node.args[0]) - len(normalized):
        raise _MixesRows(f"{_name(node)} is over the rows")
    return axis


def _over_dims(position: int, keepdim: int | None) -> Callable[[_Follower, fx.Node], Axis]:
    """A reduction (or, with keepdim None, a scan or softmax) over the dims at args[position]."""

    def rule(follow: _Follower, node: fx.Node) -> Axis:
        source = node.args[0]
        axis, rank = follow.axis(source), follow.rank(source)
        dims: Any = node.args[position] if len(node.args) > position else None
        if dims is None or dims == []:
            raise _MixesRows(f"{_name(node)} is over all axes")
        over = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
        if axis in over:
            raise _MixesRows(f"{_name(node)} is over the rows")
        assert axis is not None
        if keepdim is None or (len(node.args) > keepdim and node.args[keepdim]) or node.kwargs.get("keepdim"):
            return axis
        return axis - len([d for d in over if d < axis])

    return rule


def _view(follow: _Follower, node: fx.Node) -> Axis:
    source: Any = node.args[0]
    axis = follow.axis(source)
    before = list(source.meta["val"].shape)
    value: Any = node.meta["val"]
    lead = _product(before[:axis])
    for found, size in enumerate(value.shape):
        is_rows = not isinstance(size, int) and size.node.expr == follow.symbol
        if is_rows and sympy.simplify(_product(value.shape[:found]) - lead) == 0:
            return found
    raise _Unknown


def _product(sizes: Sequence[Any]) -> Any:
    result = sympy.Integer(1)
    for size in sizes:
        result *= size if isinstance(size, int) else size.node.expr
    return result


def _permute(follow: _Follower, node: fx.Node) -> Axis:
    order: Any = node.args[1]
    rank = follow.rank(node.args[0])
    at: int = [d % rank for d in order].index(follow.axis(node.args[0]))
    return at


def _transpose(follow: _Follower, node: fx.Node) -> Axis:
    rank = follow.rank(node.args[0])
    dims: Any = node.args[1:3]
    a, b = (int(d) % rank for d in dims)
    axis = follow.axis(node.args[0])
    return b if axis == a else a if axis == b else axis


def _t(follow: _Follower, node: fx.Node) -> Axis:
    axis = follow.axis(node.args[0])
    return axis if follow.rank(node.args[0]) < 2 or axis is None else 1 - axis


def _unsqueeze(follow: _Follower, node: fx.Node) -> Axis:
    dim: Any = node.args[1]
    axis, new = follow.axis(node.args[0]), int(dim) % (follow.rank(node.args[0]) + 1)
    return axis if axis is None or axis < new else axis + 1


def _squeeze(follow: _Follower, node: fx.Node) -> Axis:
    axis, rank = follow.axis(node.args[0]), follow.rank(node.args[0])
    if len(node.args) < 2:
        raise _Unknown
    dims: Any = node.args[1]
    gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if axis in gone:
        raise _MixesRows(f"{_name(node)} drops the axis of the rows")
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    return None if axis is None else axis - sum(d < axis and shape[d] == 1 for d in gone)


def _expand(follow: _Follower, node: fx.Node) -> Axis:
    axis = follow.axis(node.args[0])
    value: Any = node.meta["val"]
    return None if axis is None else axis + value.ndim - follow.rank(node.args[0])


def _within(position: int) -> Callable[[_Follower, fx.Node], Axis]:
    """Cuts or joins along the dim at args[position], which must not be the rows."""

    def rule(follow: _Follower, node: fx.Node) -> Axis:
        first: Any = node.all_input_nodes[0]
        dim: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
        axes = {follow.axis(source) for source in node.all_input_nodes if source in follow.rows}
        if len(axes) > 1:
            raise _MixesRows(f"{_name(node)} joins rows with tensors that have none")
        (axis,) = axes
        if axis == int(dim) % follow.rank(first):
            raise _MixesRows(f"{_name(node)} is along the rows")
        return axis

    return rule


def _select(follow: _Follower, node: fx.Node) -> Axis:
    axis = _within(1)(follow, node)
    given: Any = node.args[1]
    dim = int(given) % follow.rank(node.args[0])
    return None if axis is None else axis - (dim < axis)


def _stack(follow: _Follower, node: fx.Node) -> Axis:
    axes = {follow.axis(source) for source in node.all_input_nodes}
    if len(axes) > 1:
        raise _MixesRows(f"{_name(node)} joins rows with tensors that have none")
    (axis,) = axes
    value: Any = node.meta["val"]
    given: Any = node.args[1] if len(node.args) > 1 else 0
    dim = int(given) % value.ndim
    return None if axis is None else axis + (dim <= axis)


def _embedding(follow: _Follower, node: fx.Node) -> Axis:
    if follow.axis(node.args[0]) is not None:
        raise _MixesRows(f"{_name(node)} looks up in the rows")
    return follow.axis(node.args[1])


def _batched(follow: _Follower, node: fx.Node) -> Axis:
    """An operator whose axis 0 is a batch: convolution, batch norm with fixed statistics, pooling."""
    _others_free(follow, node, node.args[0])
    if follow.axis(node.args[0]) != 0:
        raise _MixesRows(f"{_name(node)} is over the rows")
    return 0


def _batch_norm(follow: _Follower, node: fx.Node) -> Axis:
    if node.args[5]:
        raise _MixesRows(f"{_name(node)} takes its statistics over the rows")
    return _batched(follow, node)


def _attention(follow: _Follower, node: fx.Node) -> Axis:
    q, k, v = node.args[:3]
    axes = [follow.axis(source) for source in (q, k, v)]
    rank = follow.rank(q)
    if axes[0] is not None and axes[0] < rank - 2 and axes[0] == axes[1] == axes[2]:
        return axes[0]
    raise _MixesRows(f"{_name(node)} attends from rows to rows")


_RULES: dict[Any, Callable[[_Follower, fx.Node], Axis]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.softmax.int: _over_dims(1, None),
    aten._softmax.default: _over_dims(1, None),
    aten.log_softmax.int: _over_dims(1, None),
    aten.cumsum.default: _over_dims(1, None),
    aten.sum.dim_IntList: _over_dims(1, 2),
    aten.mean.dim: _over_dims(1, 2),
    aten.amax.default: _over_dims(1, 2),
    aten.amin.default: _over_dims(1, 2),
    aten.max.dim: _over_dims(1, 2),
    aten.min.dim: _over_dims(1, 2),
    aten.argmax.default: _over_dims(1, 2),
    aten.argmin.default: _over_dims(1, 2),
    aten.var.correction: _over_dims(1, 3),
    aten.sum.default: _over_dims(1, None),
    aten.mean.default: _over_dims(1, None),
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _within(1),
    aten.select.int: _select,
    aten.cat.default: _within(1),
    aten.stack.default: _stack,
    aten.split.Tensor: _within(2),
    aten.split_with_sizes.default: _within(2),
    aten.chunk.default: _within(2),
    aten.glu.default: _within(1),
    aten.embedding.default: _embedding,
    aten.conv1d.default: _batched,
    aten.conv2d.default: _batched,
    aten.conv1d.padding: _batched,
    aten.conv2d.padding: _batched,
    aten.batch_norm.default: _batch_norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten._to_copy.default: _same,
    aten.to.dtype: _same,
}


def _compare(
    graph_module: fx.GraphModule,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    sizes: Sequence[int],
    are_states: Sequence[bool],
    are_updates: Sequence[bool],
) -> str | None:
    """What differs between all rows at once and chunk by chunk; None when nothing does."""
    generator = torch.Generator().manual_seed(20261)
    for size in sizes:
        total = size + max(1, size // 2)
        whole = [_random(port, total, generator) for port in inputs]
        chunks = [size, *([1] * (total - size) if any(are_states) else [size])]
        try:
            with torch.no_grad():
                wanted = graph_module(*whole)
                found = _chunk_by_chunk(graph_module, whole, inputs, outputs, chunks, are_states, are_updates)
        except Exception as error:
            return f"it cannot be tried: {type(error).__name__}: {str(error).splitlines()[0]}"
        for port, a, b in zip(outputs, wanted, found, strict=True):
            largest = float(a.abs().max()) if a.is_floating_point() and a.numel() else 0.0
            difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            if not difference <= _TOLERANCE * max(1.0, largest):
                return f"{port.name} by {difference:.2g} with {total} rows in chunks of {size}"
    return None


def _random(port: Port, rows: int, generator: torch.Generator) -> Tensor:
    shape = shape_of(port.shape, {ROWS: rows})
    dtype = getattr(torch, port.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)  # small: they may be indices


def _chunk_by_chunk(
    graph_module: fx.GraphModule,
    whole: Sequence[Tensor],
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    chunks: Sequence[int],
    are_states: Sequence[bool],
    are_updates: Sequence[bool],
) -> list[Tensor]:
    states = [tensor for tensor, is_state in zip(whole, are_states, strict=True) if is_state]
    parts: list[list[Tensor]] = [[] for _ in outputs]
    start = 0
    for size in chunks:
        given = iter(states)
        args = [
            next(given) if is_state else _chunk(tensor, port, start, size)
            for tensor, port, is_state in zip(whole, inputs, are_states, strict=True)
        ]
        results = graph_module(*args)
        states = [result for result, is_update in zip(results, are_updates, strict=True) if is_update]
        total = max(
            t.shape[p.shape.index(ROWS)] for t, p in zip(whole, inputs, strict=True) if ROWS in p.shape
        )
        rows = min(size, total - start)
        for part, result, port, is_update in zip(parts, results, outputs, are_updates, strict=True):
            if is_update:
                part[:] = [result]
            else:
                part.append(result.narrow(port.shape.index(ROWS), 0, rows))
        start += size
    return [
        part[0] if is_update else torch.cat(part, port.shape.index(ROWS))
        for part, port, is_update in zip(parts, outputs, are_updates, strict=True)
    ]


def _chunk(tensor: Tensor, port: Port, start: int, size: int) -> Tensor:
    """Rows start … start + size, zeros behind the last one."""
    if ROWS not in port.shape:
        return tensor
    axis = port.shape.index(ROWS)
    rows = tensor.narrow(axis, start, min(size, tensor.shape[axis] - start))
    missing = size - rows.shape[axis]
    if not missing:
        return rows
    shape = list(rows.shape)
    shape[axis] = missing
    return torch.cat((rows, torch.zeros(shape, dtype=rows.dtype)), axis)
