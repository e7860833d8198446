"""Follow the axis of the rows through a graph; each operator keeps rows apart, or is refused because it mixes them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.nodes import expression, is_call

aten = torch.ops.aten

# Every number of their results is the same, so that rows of them are alike however many there are.
_FILLING = (
    aten.expand.default,  # of one row to all
    *(aten.zeros.default, aten.ones.default, aten.full.default),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
)

Axis = int | None  # the axis of the rows; None: a tensor without rows


class MixesRows(Exception):
    """An operator makes rows depend on one another, or on how many there are."""


class UnknownOperator(Exception):
    """An operator that this module does not know, or knows for other arguments: its name."""


class Follower:
    """Follows the axis of the rows through a graph."""

    def __init__(self, rows: dict[fx.Node, Axis], symbol: Any) -> None:
        self.rows = rows
        self.symbol = symbol
        # How often all rows stand behind one another in their axis, where they are repeated as a whole: [4 * T, D] has
        # 4, until a view makes it [4, T, D].
        self.repeated: dict[fx.Node, int] = {}

    def node(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem:
            self.rows[node] = self.rows[node.all_input_nodes[0]]
            return
        if not isinstance(value, (Tensor, tuple, list)):
            return
        tensors = [source for source in node.all_input_nodes if source in self.rows]
        if all(self.rows[source] is None for source in tensors):
            first = value if isinstance(value, Tensor) else value[0]
            axes = [axis for axis, size in enumerate(first.shape) if self.has_rows(size)]
            if len(axes) == 1 and node.target in _FILLING:
                self.rows[node] = axes[0]
                return
            if axes:
                raise MixesRows(f"{_name(node)} is made from the number of rows")
            self.rows[node] = None
            return
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule = _RULES.get(node.target, _pointwise if is_pointwise else _decomposed)
        self.rows[node] = rule(self, node)
        times = {self.repeated.get(source, 1) for source in tensors if self.rows[source] is not None}
        if rule is _pointwise and len(times) == 1:
            self.repeated[node] = times.pop()
        elif rule is not _view and times != {1}:
            raise MixesRows(f"{_name(node)} combines rows with other rows")

    def has_rows(self, size: Any) -> bool:
        return self.symbol in expression(size).free_symbols

    def axis(self, node: Any) -> Axis:
        return self.rows.get(node) if isinstance(node, fx.Node) else None

    def rank(self, node: Any) -> int:
        return len(node.meta["val"].shape)

    def source(self, node: fx.Node, at: int = 0) -> tuple[int, int]:
        """(axis of the rows, rank) of an argument; raises MixesRows where another argument has rows."""
        first = node.args[at]
        if any(self.axis(other) is not None for other in node.all_input_nodes if other is not first):
            raise MixesRows(f"{_name(node)} uses rows as weights")
        axis = self.axis(first)
        assert axis is not None  # a rule is asked only where some argument has rows
        return axis, self.rank(first)


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _decomposed(follow: Follower, node: fx.Node) -> Axis:
    """Follow the operators that torch decomposes this operator into."""
    given = [source for source in node.all_input_nodes if source in follow.rows]
    others = {source: source.meta["val"] for source in node.all_input_nodes if source not in follow.rows}

    def call(*tensors: Tensor) -> Any:
        values = others | dict(zip(given, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    examples = [source.meta["val"] for source in given]
    try:
        with detect_fake_mode(examples) or nullcontext():
            traced = make_fx(call, dict(core_aten_decompositions()))(*examples)
    except Exception:
        raise UnknownOperator(_name(node)) from None
    inner: dict[fx.Node, Axis] = {}
    *steps, output = traced.graph.nodes
    for step in steps:
        if step.op == "placeholder":
            inner[step] = follow.rows[given[len(inner)]]
        elif step.op != "call_function" or step.target is node.target:
            raise UnknownOperator(_name(node))
    within = Follower(inner, follow.symbol)
    for step in steps[len(given) :]:
        within.node(step)
    axes = {within.axis(result) for result in output.all_input_nodes}
    if len(axes) != 1:
        raise UnknownOperator(_name(node))
    return axes.pop()


def _pointwise(follow: Follower, node: fx.Node) -> Axis:
    """An operator that broadcasts: the axis keeps its distance from the last one."""
    found = {
        axis + follow.rank(node) - follow.rank(source)
        for source in node.all_input_nodes
        if (axis := follow.axis(source)) is not None
    }
    if len(found) > 1:
        raise MixesRows(f"{_name(node)} combines rows with other rows")
    return found.pop()


def _linear(follow: Follower, node: fx.Node) -> Axis:
    # The bias comes first in addmm, last in linear.
    axis, rank = follow.source(node, at=1 if node.target is aten.addmm.default else 0)
    if axis == rank - 1:
        raise MixesRows(f"{_name(node)} adds up along the rows")
    return axis


def _matmul(follow: Follower, node: fx.Node) -> Axis:
    a, b = map(follow.axis, node.args[:2])
    left_rank, right_rank = map(follow.rank, node.args[:2])
    rank = follow.rank(node)
    if min(left_rank, right_rank) < 2:
        raise UnknownOperator(_name(node))
    # Counted from the end, because a product broadcasts over the axes in front of the last two.
    from_end = {axis - rank for axis, rank in ((a, left_rank), (b, right_rank)) if axis is not None}
    if len(from_end) == 1 and max(from_end) < -2:
        return rank + from_end.pop()  # a batch of products
    if b is None and a == left_rank - 2:
        return rank - 2
    if a is None and b == right_rank - 1:
        return rank - 1
    raise MixesRows(f"{_name(node)} adds up along the rows, or combines each with each")


def _norm(follow: Follower, node: fx.Node) -> Axis:
    axis, rank = follow.source(node)
    if axis >= rank - len(node.args[1]):  # type: ignore[arg-type]
        raise MixesRows(f"{_name(node)} is over the rows")
    return axis


def _argument(node: fx.Node, *names: str) -> Any:
    """The first argument of these names, or its default; None for an operator without such an argument."""
    for at, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if parameter.name in names:
            if at < len(node.args):
                return node.args[at]
            return node.kwargs.get(parameter.name, parameter.default_value)
    return None


def _axes(dims: Any, rank: int) -> set[int]:
    return {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}


def _over_dims(follow: Follower, node: fx.Node) -> Axis:
    """A reduction, a scan, a sort or a softmax over the axes it names."""
    axis, rank = follow.source(node)
    dims = _argument(node, "dim", "dims")
    if dims is None or dims == []:
        raise MixesRows(f"{_name(node)} is over all axes")
    over = _axes(dims, rank)
    if axis in over:
        raise MixesRows(f"{_name(node)} is over the rows")
    return axis - sum(d < axis for d in over) if _argument(node, "keepdim") is False else axis


def _view(follow: Follower, node: fx.Node) -> Axis:
    """The rows stay apart where an axis that counts them has as many elements in front of it as before the view.

    The axis may count several neighbours for each row: [T, 4, D] as [4 * T, D], and back.
    """
    source: Any = node.args[0]
    value: Any = node.meta["val"]
    lead = _product(source.meta["val"].shape[: follow.axis(source)]) * follow.repeated.get(source, 1)
    axes = [axis for axis, size in enumerate(value.shape) if follow.has_rows(size)]
    for found in axes:
        if sympy.simplify(_product(value.shape[:found]) - lead) == 0:
            return found
    for found in axes:
        times = lead / _product(value.shape[:found])
        if times.is_Integer and expression(value.shape[found]) == times * follow.symbol:
            follow.repeated[node] = int(times)
            return found
    raise UnknownOperator(_name(node))


def _product(sizes: Sequence[Any]) -> Any:
    return sympy.Mul(*map(expression, sizes))


def _permute(follow: Follower, node: fx.Node) -> Axis:
    # The output's axis i is the input's axis order[i].
    order: Any = node.args[1]
    axis, rank = follow.source(node)
    return [int(d) % rank for d in order].index(axis)


def _transpose(follow: Follower, node: fx.Node) -> Axis:
    axis, rank = follow.source(node)
    dims: Any = node.args[1:3] or (0, 1)  # aten.t names none
    a, b = (int(d) % rank for d in dims)
    return b if axis == a else a if axis == b else axis


def _squeeze(follow: Follower, node: fx.Node) -> Axis:
    axis, rank = follow.source(node)
    if len(node.args) < 2:
        raise UnknownOperator(_name(node))
    gone = _axes(node.args[1], rank)
    if axis in gone:
        raise MixesRows(f"{_name(node)} drops the axis of the rows")
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    return axis - len([d for d in gone if d < axis and shape[d] == 1])


def _repeat(follow: Follower, node: fx.Node) -> Axis:
    repeats: Any = node.args[1]
    axis, rank = follow.source(node)
    found = axis + len(repeats) - rank
    if repeats[found] != 1:
        whole = isinstance(repeats[found], int) and not any(
            size != 1 for size in node.meta["val"].shape[:found]
        )
        if not whole or expression(node.args[0].meta["val"].shape[axis]) != follow.symbol:  # type: ignore[union-attr]
            raise MixesRows(f"{_name(node)} repeats the rows")
        follow.repeated[node] = repeats[found]
    return found


def _pad(follow: Follower, node: fx.Node) -> Axis:
    amounts: Any = node.args[1]  # (before, after) of the last axis, then of the axis before it, …
    axis, rank = follow.source(node)
    if any(amounts[2 * (rank - 1 - axis) :][:2]):
        raise MixesRows(f"{_name(node)} adds rows")
    return axis


def _common_axis(follow: Follower, node: fx.Node) -> int:
    axes = {follow.axis(source) for source in node.all_input_nodes if source in follow.rows}
    axis = axes.pop()
    if axes or axis is None:
        raise MixesRows(f"{_name(node)} joins rows with tensors that have none")
    return axis


def _within(follow: Follower, node: fx.Node) -> int:
    """Cuts or joins along an axis other than the rows'."""
    axis = _common_axis(follow, node)
    if axis == int(_argument(node, "dim")) % follow.rank(node.all_input_nodes[0]):
        raise MixesRows(f"{_name(node)} is along the rows")
    return axis


def _select(follow: Follower, node: fx.Node) -> Axis:
    axis = _within(follow, node)
    return axis - (int(_argument(node, "dim")) % follow.rank(node.args[0]) < axis)


def _new_axis(follow: Follower, node: fx.Node) -> Axis:
    axis = _common_axis(follow, node)
    return axis + (int(_argument(node, "dim")) % follow.rank(node) <= axis)


def _lookup(follow: Follower, node: fx.Node) -> Axis:
    """table[:, index] and the like: rows of a table looked up, or features picked from rows."""
    table: Any = node.args[0]
    places: Any = node.args[1]
    if is_call(node, aten.index_select.default):
        places = [None] * (int(places) % follow.rank(table)) + [node.args[2]]
    (at, index), *others = [(at, index) for at, index in enumerate(places) if index is not None]
    if others:
        raise UnknownOperator(_name(node))
    axis = follow.axis(table)
    if axis is None:
        found = follow.axis(index)
        assert found is not None  # a rule is asked only where some argument has rows
        return at + found
    if follow.axis(index) is not None or axis == at:
        raise MixesRows(f"{_name(node)} looks up in the rows")
    return axis if axis < at else axis + follow.rank(index) - 1


def _embedding(follow: Follower, node: fx.Node) -> Axis:
    if follow.axis(node.args[0]) is not None:
        raise MixesRows(f"{_name(node)} looks up in the rows")
    return follow.axis(node.args[1])


def _gather(follow: Follower, node: fx.Node) -> Axis:
    source, _, index = node.args[:3]
    axis, rows = follow.axis(source), follow.axis(index)
    along = int(_argument(node, "dim")) % follow.rank(node)
    if (axis is None and rows == along) or (axis == rows and rows != along):
        return rows
    raise MixesRows(f"{_name(node)} looks up along the rows")


def _batched(follow: Follower, node: fx.Node) -> Axis:
    """An operator whose axis 0 is a batch: convolution, batch norm with fixed statistics, pooling."""
    axis, _ = follow.source(node)
    if axis != 0:
        raise MixesRows(f"{_name(node)} is over the rows")
    return 0


def _batch_norm(follow: Follower, node: fx.Node) -> Axis:
    if node.args[5]:
        raise MixesRows(f"{_name(node)} takes its statistics over the rows")
    return _batched(follow, node)


def _attention(follow: Follower, node: fx.Node) -> Axis:
    first, *others = (follow.axis(source) for source in node.args[:3])
    if first is not None and first < follow.rank(node.args[0]) - 2 and others == [first, first]:
        return first
    raise MixesRows(f"{_name(node)} attends from rows to rows")


def _experts(follow: Follower, node: fx.Node) -> Axis:
    """Each row chooses experts, and has results, of its own."""
    # x and index of a linear, x and scores of a sum; weights that rows make are not followed.
    if any(follow.axis(source) is not None for source in node.all_input_nodes if source not in node.args[:2]):
        raise MixesRows(f"{_name(node)} uses rows as weights")
    if [follow.axis(source) for source in node.args[:2]] != [0, 0]:
        raise MixesRows(f"{_name(node)} combines rows with other rows")
    return 0


# Operators without a rule are pointwise by torch's tag, or are followed through torch's decomposition.
_OPERATORS: dict[Callable[[Follower, fx.Node], Axis], str] = {
    _linear: "linear.default addmm.default",
    _matmul: "mm.default bmm.default matmul.default",
    _norm: "layer_norm.default rms_norm.default",
    _over_dims: """
        softmax.int _softmax.default log_softmax.int cumsum.default sum.dim_IntList mean.dim amax.default
        amin.default max.dim min.dim argmax.default argmin.default var.correction std.correction
        var_mean.correction std_mean.correction prod.dim_int any.dim any.dims any.default all.dim all.dims
        all.default logsumexp.default linalg_vector_norm.default cumprod.default sort.default topk.default
        flip.default roll.default max.default min.default sum.default mean.default
    """,
    _view: "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int",
    _permute: "permute.default",
    _transpose: "transpose.int t.default",
    _new_axis: "unsqueeze.default stack.default",
    _squeeze: "squeeze.dim squeeze.dims",
    _pointwise: """
        expand.default clone.default contiguous.default _to_copy.default to.dtype full_like.default
        ones_like.default zeros_like.default
    """,
    _repeat: "repeat.default",
    _pad: "constant_pad_nd.default",
    _within: """
        slice.Tensor cat.default split.Tensor split_with_sizes.default chunk.default glu.default
        slice_scatter.default scatter.src scatter.value
    """,
    _select: "select.int",
    _embedding: "embedding.default",
    _lookup: "index.Tensor index_select.default",
    _gather: "gather.default",
    _batched: """
        conv1d.default conv2d.default conv1d.padding conv2d.padding conv_transpose1d.default
        conv_transpose2d.input group_norm.default avg_pool1d.default avg_pool2d.default max_pool2d.default
        max_pool2d_with_indices.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default
        convolution.default _native_batch_norm_legit_no_training.default
    """,
    _batch_norm: "batch_norm.default",
    _attention: "scaled_dot_product_attention.default",
}
_RULES = {attrgetter(name)(aten): rule for rule, names in _OPERATORS.items() for name in names.split()}
_RULES |= dict.fromkeys(
    (torch.ops.doubleweave.expert_linear.default, torch.ops.doubleweave.expert_sum.default), _experts
)
