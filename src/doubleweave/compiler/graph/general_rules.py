"""How each operator is copied to the graph of queries and keys: by whose the axes of its result are, those of what it
reads are told.

A rule raises NotUnderstood for rows that meet otherwise than over keys.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.evaluate import SIZE_ONLY
from doubleweave.compiler.graph.general_part import KEY, QUERY, Labels, Part, Rule
from doubleweave.compiler.graph.nodes import expression, insert, is_call, is_tensor
from doubleweave.compiler.graph.ops import MASKED
from doubleweave.compiler.graph.position_bias import NotUnderstood

aten = torch.ops.aten


def _pointwise(part: Part, node: Any, labels: Labels) -> Any:
    rank = part.rank(node)

    def own(source: Any) -> Any:
        if not is_tensor(source):
            raise NotUnderstood(f"{node.target} takes a number that follows from how many tokens there are")
        more = rank - part.rank(source)
        return part.source(source, {axis - more: kind for axis, kind in labels.items()})

    args, kwargs = fx.map_arg((node.args, node.kwargs), own)
    return part.call(node, *args, **kwargs)


def _expand(part: Part, node: Any, labels: Labels) -> Any:
    more = part.rank(node) - part.rank(node.args[0])
    source = part.source(node.args[0], {axis - more: kind for axis, kind in labels.items()})
    return part.call(node, source, part.numbers(node.args[1], labels))


def _filled(part: Part, node: Any, labels: Labels) -> Any:
    """A tensor of one number."""
    value = node.meta["val"]
    if is_call(node, aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default):
        number: Any = 0
    elif is_call(node, aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        number = 1
    elif is_call(node, aten.full.default, aten.full_like.default):
        number = node.args[1]
    elif is_call(node, aten.new_full.default):
        number = node.args[2]
    else:
        raise NotUnderstood(f"{node.target} makes a tensor without numbers")
    if any(expression(value.shape[axis]) != part.positions.symbol for axis in labels):
        raise NotUnderstood(f"{node.target} has a size that follows from how many tokens there are")
    sizes = [part.size[labels[a]] if a in labels else int(size) for a, size in enumerate(value.shape)]
    number = bool(number) if value.dtype == torch.bool else number
    copy = part.graph.call_function(aten.full.default, (sizes, number), {"dtype": value.dtype})
    copy.meta["val"] = value
    return copy


def _arange(part: Part, node: Any, labels: Labels) -> Any:
    start = 0 if is_call(node, aten.arange.default) else node.args[0]
    step = node.args[2] if len(node.args) > 2 else 1
    value = node.meta["val"]
    if not labels:
        return part.call(node, *node.args, **node.kwargs)
    if not isinstance(start, int) or step != 1 or expression(value.shape[0]) != part.positions.symbol:
        raise NotUnderstood(f"{node.target} counts otherwise than the tokens")
    return part.counted(labels[0], start, value.dtype, node)


def _matmul(part: Part, node: Any, labels: Labels) -> Any:
    left, right = node.args[:2]
    ranks, rank = [part.rank(left), part.rank(right)], part.rank(node)
    if min(ranks) < 2:
        raise NotUnderstood("a product with a vector")
    given = []
    for source, own, kept in ((left, ranks[0], -2), (right, ranks[1], -1)):
        found = {axis - rank + own: kind for axis, kind in labels.items() if axis - rank < -2}
        found |= {own + kept: labels[rank + kept]} if rank + kept in labels else {}
        # What is added up is added up over keys.
        given.append(part.source(source, found | {own - 3 - kept: KEY}))
    return part.call(node, *given)


def _over(part: Part, node: Any, labels: Labels) -> Any:
    """A softmax, a scan or a sort along one axis, of keys where it is one of rows."""
    source = node.args[0]
    dim = _dim(node, part.rank(source))
    if labels.get(dim, KEY) != KEY:
        raise NotUnderstood(f"{node.target} is along the queries")
    rest = list(node.args[1:])
    if is_call(node, aten.topk.default):
        rest[0] = part.number(rest[0], KEY)
    return part.call(node, part.source(source, labels | {dim: KEY}), *rest, **node.kwargs)


def _dim(node: Any, rank: int) -> int:
    names = [argument.name for argument in node.target._schema.arguments]
    at = names.index("dim")
    found = node.args[at] if at < len(node.args) else node.kwargs.get("dim")
    if found is None:
        found = node.target._schema.arguments[at].default_value
    return int(found) % rank


def _reduced(part: Part, node: Any, labels: Labels) -> Any:
    source = node.args[0]
    rank = part.rank(source)
    dims = node.args[1] if len(node.args) > 1 else []
    over = {int(dim) % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if not over:
        raise NotUnderstood(f"{node.target} is over all axes")
    keeps = len(node.args) > 2 and bool(node.args[2])
    kept = [axis for axis in range(rank) if keeps or axis not in over]
    found = {kept[axis]: kind for axis, kind in labels.items()} | dict.fromkeys(over, KEY)
    return part.call(node, part.source(source, found), *node.args[1:], **node.kwargs)


def _view(part: Part, node: Any, labels: Labels) -> Any:
    """Rows stay in order: the axes with rows are those of the source, one for one."""
    source = node.args[0]
    rows = part.rows_of(source)
    if len(rows) != len(labels):
        raise NotUnderstood(f"{node.target} joins queries and keys")
    given = part.source(source, dict(zip(rows, labels.values(), strict=True)))
    if is_call(node, aten.flatten.using_ints):
        return part.call(node, given, *node.args[1:])
    return part.call(node, given, part.numbers(node.args[1], labels))


def _transpose(part: Part, node: Any, labels: Labels) -> Any:
    rank = part.rank(node)
    a, b = (int(dim) % rank for dim in node.args[1:3])
    swapped = {a: b, b: a}
    source = part.source(node.args[0], {swapped.get(axis, axis): kind for axis, kind in labels.items()})
    return part.call(node, source, *node.args[1:])


def _permute(part: Part, node: Any, labels: Labels) -> Any:
    order = [int(dim) % part.rank(node) for dim in node.args[1]]
    source = part.source(node.args[0], {order[axis]: kind for axis, kind in labels.items()})
    return part.call(node, source, *node.args[1:])


def _unsqueeze(part: Part, node: Any, labels: Labels) -> Any:
    new = int(node.args[1]) % part.rank(node)
    source = part.source(node.args[0], {axis - (axis > new): kind for axis, kind in labels.items()})
    return part.call(node, source, *node.args[1:])


def _without(part: Part, node: Any, labels: Labels) -> Any:
    """One axis fewer, if it is gone: a place of it is selected, or it had one place."""
    rank = part.rank(node.args[0])
    gone = int(node.args[1]) % rank
    fewer = part.rank(node) < rank
    found = {axis + (fewer and axis >= gone): kind for axis, kind in labels.items()}
    return part.call(node, part.source(node.args[0], found), *node.args[1:])


def _slice(part: Part, node: Any, labels: Labels) -> Any:
    defaults: tuple[Any, ...] = (0, 0, None, 1)
    given: tuple[Any, ...] = node.args
    source, dim, start, end, step = given + defaults[len(given) - 1 :]
    dim %= part.rank(source)
    if dim not in labels:
        return part.call(node, part.source(source, labels), *node.args[1:])
    if expression(node.meta["val"].shape[dim]) == expression(source.meta["val"].shape[dim]):
        return part.source(source, labels)  # all of it
    if dim in part.rows_of(source) and labels[dim] == KEY:
        edges = [part.number(edge, KEY) for edge in (start, end)]
        return part.call(node, part.source(source, labels), dim, *edges, step)
    if start not in (0, None) or step != 1 or dim in part.rows_of(source):
        raise NotUnderstood("rows are cut out of it")
    # Of a table for the longest sequence, as many places as there are rows.
    table = part.source(source, {axis: kind for axis, kind in labels.items() if axis != dim})
    first: Any = 0
    if labels[dim] == QUERY:
        first = part.before()
    return part.call(node, table, dim, first, part.size[KEY])


def _along(part: Part, node: Any, labels: Labels) -> Any:
    """Tensors of the same axes are joined, read or written along one of them, which is of keys if it is one of rows."""
    dim = _dim(node, part.rank(node))
    if is_call(node, aten.cat.default):
        if labels.get(dim, KEY) != KEY:
            raise NotUnderstood("queries are joined with others")
        return part.call(node, [part.source(one, labels) for one in node.args[0]], *node.args[1:])
    args = [part.source(one, labels | {dim: KEY}) if is_tensor(one) else one for one in node.args]
    return part.call(node, *args, **node.kwargs)


def _triangle(part: Part, node: Any, labels: Labels) -> Any:
    rank = part.rank(node)
    kinds = [labels.get(axis) for axis in (rank - 2, rank - 1)]
    diagonal = node.args[1] if len(node.args) > 1 else 0
    if kinds == [QUERY, KEY]:
        moved = part.graph.call_function(operator.add, (part.before(), diagonal))
        moved.meta["val"] = diagonal
        diagonal = moved
    elif kinds[0] != kinds[1]:
        raise NotUnderstood(f"{node.target} is of other axes than queries and keys")
    return part.call(node, part.source(node.args[0], labels), diagonal)


def _repeat(part: Part, node: Any, labels: Labels) -> Any:
    source = node.args[0]
    if is_call(node, aten.repeat.default):
        more = part.rank(node) - part.rank(source)
        if any(node.args[1][axis] != 1 for axis in labels):
            raise NotUnderstood("rows are repeated")
        found = {axis - more: kind for axis, kind in labels.items()}
    elif _dim(node, part.rank(node)) in labels:
        raise NotUnderstood("rows are repeated")
    else:
        found = labels
    return part.call(node, part.source(source, found), *node.args[1:], **node.kwargs)


def _linear(part: Part, node: Any, labels: Labels) -> Any:
    if part.rank(node) - 1 in labels:
        raise NotUnderstood("a linear is over the rows")
    return part.call(node, part.source(node.args[0], labels), *(part.source(w, {}) for w in node.args[1:]))


def _embedding(part: Part, node: Any, labels: Labels) -> Any:
    return part.call(node, part.source(node.args[0], {}), part.source(node.args[1], labels))


def _lookup(part: Part, node: Any, labels: Labels) -> Any:
    """table[i, j, …]: a number for each place of the indices, which broadcast."""
    table, places = node.args[:2]
    if any(place is None for place in places) or len(places) != part.rank(table):
        raise NotUnderstood("rows are looked up in it")
    if part.rows_of(table) and table not in part.positions.nodes:
        raise NotUnderstood("rows are looked up in others")
    rank = part.rank(node)
    found = []
    for place in places:
        more = rank - part.rank(place)
        found.append(part.source(place, {axis - more: kind for axis, kind in labels.items()}))
    # Positions are counted from the first of all rows.
    return part.call(node, part.source(table, dict.fromkeys(part.rows_of(table), KEY)), found)


def _masked(part: Part, node: Any, labels: Labels) -> Any:
    """Attention under a mask, in plain operators; its own keys are the ones up to a query."""
    graph = part.graph
    q, k, v, mask, num_heads, num_kv_heads, scale, window, soft_cap, sinks = node.args
    (rows,) = labels.values()
    rank = part.rank(mask)
    hidden = part.source(mask, {rank - 2: rows, rank - 1: KEY})

    def op(target: Any, *args: Any) -> Any:
        return insert(graph, target, *args, like=node)

    def heads(source: Any, kind: str, count: int) -> Any:
        width = int(source.meta["val"].shape[2]) // count
        given = part.source(source, {1: kind})
        return op(aten.transpose.int, op(aten.view.default, given, [1, part.size[kind], count, width]), 1, 2)

    queries, keys, values = (
        heads(q, rows, num_heads),
        heads(k, KEY, num_kv_heads),
        heads(v, KEY, num_kv_heads),
    )
    if num_kv_heads != num_heads:
        keys, values = (
            op(aten.repeat_interleave.self_int, one, num_heads // num_kv_heads, 1) for one in (keys, values)
        )
    scores = op(aten.matmul.default, queries, op(aten.transpose.int, keys, 2, 3))
    scores = op(aten.mul.Tensor, scores, scale)
    if soft_cap:
        scores = op(aten.tanh.default, op(aten.div.Tensor, scores, soft_cap))
        scores = op(aten.mul.Tensor, scores, soft_cap)
    least = torch.finfo(torch.float32).min
    if mask.meta["val"].dtype == torch.bool:
        scores = op(aten.masked_fill.Scalar, scores, op(aten.logical_not.default, hidden), least)
    else:
        scores = op(aten.add.Tensor, scores, hidden)
    scores = op(aten.masked_fill.Scalar, scores, part.hidden(rows, node, window), least)
    if sinks is not None:
        own = op(aten.view.default, part.source(sinks, {}), [1, num_heads, 1, 1])
        own = op(aten.expand.default, own, [1, num_heads, part.size[rows], 1])
        scores = op(aten.cat.default, [scores, own], -1)
    weights = op(aten.softmax.int, scores, -1)
    if sinks is not None:
        weights = op(aten.slice.Tensor, weights, 3, 0, part.size[KEY])
    out = op(aten.transpose.int, op(aten.matmul.default, weights, values), 1, 2)
    return op(aten.reshape.default, out, [1, part.size[rows], int(node.meta["val"].shape[2])])


_OPERATORS: dict[Rule, tuple[Any, ...]] = {
    _expand: (aten.expand.default,),
    _filled: (*SIZE_ONLY, aten.zeros.default, aten.ones.default, aten.full.default),
    _arange: (aten.arange.default, aten.arange.start, aten.arange.start_step),
    _matmul: (aten.matmul.default, aten.bmm.default, aten.mm.default),
    _over: (
        *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default),
        *(aten.topk.default, aten.sort.default, aten.argsort.default),
    ),
    _reduced: (
        *(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.any.dim),
        *(aten.all.dim, aten.logsumexp.default),
    ),
    _view: (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints),
    _transpose: (aten.transpose.int,),
    _permute: (aten.permute.default,),
    _unsqueeze: (aten.unsqueeze.default,),
    _without: (aten.select.int, aten.squeeze.dim),
    _slice: (aten.slice.Tensor,),
    _along: (
        *(aten.cat.default, aten.scatter.value, aten.scatter.src, aten.scatter_add.default),
        aten.gather.default,
    ),
    _triangle: (aten.triu.default, aten.tril.default),
    _repeat: (aten.repeat.default, aten.repeat_interleave.self_int),
    _linear: (aten.linear.default,),
    _embedding: (aten.embedding.default,),
    _lookup: (aten.index.Tensor,),
    _pointwise: (
        *(aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default),
        *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
        *(aten.__and__.Tensor, aten.__or__.Tensor, aten.to.dtype_layout, aten.type_as.default),
    ),
    _masked: (MASKED,),
}
_RULES: dict[Any, Rule] = {target: rule for rule, targets in _OPERATORS.items() for target in targets}


def rule_of(node: Any) -> Rule | None:
    """The rule of a node's operator; None for one that has none."""
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return _RULES.get(node.target, _pointwise if is_pointwise else None)
