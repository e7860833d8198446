"""Attention that the attention operator does not have, kept in the model's own operators.

A graph is exported with as many keys as queries. Here the part in which they meet becomes an operator over a graph of
its own, whose queries are the rows of a chunk and whose keys are all rows so far. Every axis of the part that has rows
in its size is told apart, from the result backwards: it counts queries or keys. What follows from one row alone is an
input, and what is of keys is cached. The part is tried with random numbers before it takes the place of the model's
operators. This module knows nothing of segments or transformers.

Shape legend: T queries, the newest rows; S keys, all rows so far.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.edges import Edges
from doubleweave.compiler.graph.evaluate import SIZE_ONLY
from doubleweave.compiler.graph.nodes import expression, insert, is_call, is_tensor
from doubleweave.compiler.graph.ops import GENERAL, MASKED
from doubleweave.compiler.graph.position_bias import Bias, NotUnderstood, Positions, bias_of
from doubleweave.compiler.graph.positions import POSITIONS, placeholder_of
from doubleweave.compiler.graph.sizes import larger, smaller

aten = torch.ops.aten

_BIAS = "bias"  # in a mask's meta: what it hides
GRAPH = "graph"  # in the operator's meta: the graph of queries, keys and weights that it stands for
QUERY, KEY = "query", "key"
_Axes = tuple[str, ...]  # of each axis that has rows in its size, in order: whose they are
_Labels = dict[int, str]  # the same by axis

# What lays one row's numbers out anew: the rows behind it are what is cached.
_LAYOUT = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten._unsafe_view.default),
    *(aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.expand.default, aten.clone.default, aten.contiguous.default, aten.repeat_interleave.self_int),
)
_ARITHMETIC = {"Min": smaller, "Max": larger, "Add": operator.add, "Mul": operator.mul}
_TRIED = (5, 41)  # rows: fewer than an index chooses, perhaps, and more
_SEED = 20263


def general_attention(graph_module: fx.GraphModule, node: Any, positions: Positions) -> None:
    """Put the general operator in the place of `node`, [1, T, …] or another form of rows, which attention results in.

    Raises NotUnderstood where the part cannot be told apart into queries and keys, or is no function of a row's own
    queries and of the keys up to it.
    """
    graph = graph_module.graph
    edges = Edges(positions.symbol)
    part = _Part(graph_module, positions, edges)
    part.finish(node)
    part.check(node)
    queries, keys = (
        [_outside(graph, edges, leaf, node) for leaf in part.leaves[kind]] for kind in (QUERY, KEY)
    )
    with graph.inserting_before(node):
        width = int(edges.shape(node)[2])
        result = insert(graph, GENERAL, queries, keys, part.weights, width, like=node)
        result.meta[GRAPH] = part.graph
        inside = edges.inside(graph, result, node)
    node.replace_all_uses_with(inside)
    graph.erase_node(node)


def inline_general(graph: fx.Graph) -> None:
    """Put the graphs of general operators in their place."""
    found = graph.find_nodes(op="call_function", target=GENERAL)
    for node in found:
        inner: fx.Graph = node.meta[GRAPH]
        given = dict(zip(inner.find_nodes(op="placeholder"), [*chain(*node.args[:3])], strict=True))
        with graph.inserting_before(node):
            result = graph.graph_copy(inner, given)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    # Names that follow from this graph alone: those of equal graphs are equal.
    for number, node in enumerate(graph.nodes if found else ()):
        if node.op == "call_function":
            node.name = f"n{number}"


def _outside(graph: fx.Graph, edges: Edges, leaf: Any, before: Any) -> Any:
    with graph.inserting_before(before):
        return edges.outside(graph, leaf, leaf)


class _Part:
    """The graph of the part: its inputs are `leaves[QUERY]`, `leaves[KEY]` and `weights`, nodes of the whole graph."""

    def __init__(self, graph_module: fx.GraphModule, positions: Positions, edges: Edges) -> None:
        self.module = graph_module
        self.positions = positions
        self.edges = edges
        self.graph = fx.Graph()
        self.leaves: dict[str, list[Any]] = {QUERY: [], KEY: []}
        self.weights: list[Any] = []
        self._inputs: dict[Any, Any] = {}  # placeholders by (node, whose)
        self._done: dict[tuple[Any, _Axes], Any] = {}
        # Stand for T and S until all inputs are known.
        self._rows: Tensor = placeholder_of(graph_module.graph).meta["val"]
        self.size = {kind: self.graph.placeholder(kind) for kind in (QUERY, KEY)}
        for size in self.size.values():
            size.meta["val"] = self._rows.shape[1]

    def finish(self, node: Any) -> None:
        """Copy all that `node` needs, and make it the graph's result, [1, T, features]."""
        axes = self.rows_of(node)
        if len(axes) != 1:
            raise NotUnderstood(f"its result has {len(axes)} axes of rows")
        result = self._copy(node, (QUERY,))
        if not self.leaves[QUERY] or not self.leaves[KEY]:
            raise NotUnderstood("it has no queries, or no keys")
        self.graph.output(self.edges.outside(self.graph, result, node))
        inputs = [self._inputs[leaf, kind] for kind in (QUERY, KEY) for leaf in self.leaves[kind]]
        inputs += [self._inputs[weight, ""] for weight in self.weights]
        first = next(iter(self.graph.nodes))
        for placeholder in inputs:
            if placeholder is not first:
                first.prepend(placeholder)
        with self.graph.inserting_after(inputs[-1]):
            for kind, size in self.size.items():
                tensor = self._inputs[self.leaves[kind][0], kind]
                taken = self.graph.call_function(aten.sym_size.int, (tensor, 1))
                taken.meta["val"] = size.meta["val"]
                size.replace_all_uses_with(taken)
                self.graph.erase_node(size)
        self.graph.eliminate_dead_code()
        self.graph.lint()

    def check(self, node: Any) -> None:
        """Raises NotUnderstood where the graph gives other numbers than the nodes, or than itself in chunks."""
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        generator = torch.Generator().manual_seed(_SEED)
        weights = [self.positions.values([weight], 1, {})[weight] for weight in self.weights]
        for rows in _TRIED:
            given = {leaf: self._random(leaf, rows, generator) for leaf in chain(*self.leaves.values())}
            wanted = _flat(self.positions.values([node], rows, given)[node], self, node)
            queries, keys = (
                [_flat(given[leaf], self, leaf) for leaf in self.leaves[kind]] for kind in (QUERY, KEY)
            )
            for first, end in ((0, rows), (rows // 2, rows), (0, rows // 2), (rows - 1, rows)):
                found = module(*(q[:, first:end] for q in queries), *(k[:, :end] for k in keys), *weights)
                off = float((found - wanted[:, first:end]).abs().max() / wanted.abs().max().clamp(min=1e-30))
                if not off < 1e-4:
                    raise NotUnderstood(
                        f"tokens {first} to {end - 1} of {rows} give other numbers alone, over the keys up to them, "
                        f"than all at once: off by {off:.1g}"
                    )

    def _random(self, leaf: Any, rows: int, generator: torch.Generator) -> Tensor:
        value = leaf.meta["val"]
        shape = [self.positions.size(size, rows) for size in value.shape]
        if not value.is_floating_point():
            return torch.randint(0, 2, shape, generator=generator).to(value.dtype)
        return torch.randn(shape, generator=generator).to(value.dtype)

    def rows_of(self, node: Any) -> list[int]:
        """The axes that have rows in their size."""
        value = node.meta["val"]
        first = value[0] if isinstance(value, (tuple, list)) else value
        symbol = self.positions.symbol
        return [axis for axis, size in enumerate(first.shape) if symbol in expression(size).free_symbols]

    def rank(self, node: Any) -> int:
        return len(node.meta["val"].shape)

    def emit(self, node: Any, axes: _Axes) -> Any:
        """The node's copy whose axes of rows are those of `axes`."""
        if (node, axes) not in self._done:
            self._done[node, axes] = self._emit(node, axes)
        return self._done[node, axes]

    def source(self, node: Any, labels: Mapping[int, str]) -> Any:
        """The copy of a tensor that is read, by whose its axes of rows are."""
        rows = self.rows_of(node)
        if not set(rows) <= set(labels):
            raise NotUnderstood(f"its rows meet at {node.target}")
        return self.emit(node, tuple(labels[axis] for axis in rows))

    def _emit(self, node: Any, axes: _Axes) -> Any:
        if node.op == "get_attr":
            return self._weight(node)
        is_row = node not in self.positions.nodes and len(axes) == 1
        if node.op == "placeholder" and node.target == POSITIONS:
            return insert(self.graph, aten.unsqueeze.default, self.place(axes[0]), 0, like=node)
        if node.op != "call_function" or (is_row and not is_call(node, *_LAYOUT)):
            return self._leaf(node, axes)
        if node.target is operator.getitem:
            return self.call(node, self.emit(node.args[0], axes), node.args[1])
        return self._copy(node, axes)

    def _copy(self, node: Any, axes: _Axes) -> Any:
        labels = dict(zip(self.rows_of(node), axes, strict=True))
        if node in self.positions.nodes and (bias := self._bias(node, labels)) is not None:
            return self._mask(bias, node)
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule = _RULES.get(node.target, _pointwise if is_pointwise else None)
        if rule is None:
            raise NotUnderstood(f"queries and keys meet in {node.target}")
        return rule(self, node, labels)

    def _bias(self, node: Any, labels: _Labels) -> Bias | None:
        """What a mask of positions alone hides, where it is one of queries and keys that can be understood."""
        value, rank = node.meta["val"], self.rank(node)
        if labels != {rank - 2: QUERY, rank - 1: KEY} or any(size != 1 for size in value.shape[:-2]):
            return None
        if value.dtype not in (torch.bool, torch.float32):
            return None
        if _BIAS not in node.meta:
            try:
                found = bias_of(node, self.positions)
            except NotUnderstood:
                found = None
            # The mask of a model is that of all its layers.
            is_mask = found is not None and found.slopes is None and found.distances is None
            node.meta[_BIAS] = found if is_mask else None
        bias: Bias | None = node.meta[_BIAS]
        return bias

    def _mask(self, bias: Bias, node: Any) -> Any:
        """True for what is seen, or, in float32, the least number to add for what is not."""
        hidden = self.hidden(QUERY, node, bias.window, bias.block)
        for _ in range(self.rank(node) - 2):
            hidden = insert(self.graph, aten.unsqueeze.default, hidden, 0, like=node)
        if node.meta["val"].dtype == torch.bool:
            return insert(self.graph, aten.logical_not.default, hidden, like=node)
        number = insert(self.graph, aten.to.dtype, hidden, torch.float32, like=node)
        return insert(self.graph, aten.mul.Tensor, number, torch.finfo(torch.float32).min, like=node)

    def hidden(self, kind: str, like: Any, window: int = 0, block: int = 0) -> Any:
        """bool [T, S]: the keys that are later than a query, or before its window or block."""

        def op(target: Any, *args: Any) -> Any:
            return insert(self.graph, target, *args, like=like)

        query, key = op(aten.unsqueeze.default, self.place(kind), 1), self.place(KEY)
        found = op(aten.gt.Tensor, key, query)
        if window:
            before = op(aten.le.Tensor, key, op(aten.sub.Tensor, query, window))
            found = op(aten.logical_or.default, found, before)
        if block:
            first = op(aten.sub.Tensor, query, op(aten.remainder.Scalar, query, block))
            found = op(aten.logical_or.default, found, op(aten.lt.Tensor, key, first))
        return found

    def _weight(self, node: Any) -> Any:
        if node not in self.weights:
            self.weights.append(node)
            self._inputs[node, ""] = self.graph.placeholder(f"weight{len(self.weights)}")
            self._inputs[node, ""].meta["val"] = node.meta["val"]
        return self._inputs[node, ""]

    def _leaf(self, node: Any, axes: _Axes) -> Any:
        shape = self.edges.shape(node)
        if len(axes) != 1 or str(shape[0]) != "1" or expression(shape[1]) != self.positions.symbol:
            raise NotUnderstood(f"{node.target} gives it other things than rows")
        (kind,) = axes
        placeholder = self.graph.placeholder(f"{kind}{len(self.leaves[kind])}")
        placeholder.meta["val"] = node.meta["val"]
        self.leaves[kind].append(node)
        self._inputs[node, kind] = placeholder
        return self.edges.inside(self.graph, placeholder, node)

    def place(self, kind: str) -> Any:
        """The positions of queries or keys, int64 [T] or [S]."""
        if kind == QUERY:
            found = self.graph.call_function(aten.arange.start, (self.before(), self.size[KEY]))
        else:
            found = self.graph.call_function(aten.arange.default, (self.size[KEY],))
        found.meta["val"] = self._rows.select(0, 0)
        return found

    def before(self) -> Any:
        """How many rows are older than the queries."""
        found = self.graph.call_function(operator.sub, (self.size[KEY], self.size[QUERY]))
        found.meta["val"] = 0
        return found

    def counted(self, kind: str, start: Any, dtype: torch.dtype, like: Any) -> Any:
        """`start` and what follows it, a number a row."""
        found = self.place(kind)
        if start:
            found = insert(self.graph, aten.add.Tensor, found, start, like=like)
        return found if dtype == torch.int64 else insert(self.graph, aten.to.dtype, found, dtype, like=like)

    def number(self, size: Any, kind: str) -> Any:
        """A size, with the number of queries or of keys for the rows."""
        return self._computed(expression(size.meta["val"]), kind) if isinstance(size, fx.Node) else size

    def _computed(self, size: Any, kind: str) -> Any:
        if size.is_Integer:
            return int(size)
        if size == self.positions.symbol:
            return self.size[kind]
        if (target := _ARITHMETIC.get(size.func.__name__)) is None:
            raise NotUnderstood(f"a size is {size} for {self.positions.symbol} tokens")
        first, *others = (self._computed(part, kind) for part in size.args)
        for other in others:
            first = self.graph.call_function(target, (first, other))
            first.meta["val"] = 0
        return first

    def numbers(self, sizes: Sequence[Any], labels: _Labels) -> list[Any]:
        """Sizes of a result, axis by axis."""
        return [self.number(size, labels.get(axis, "")) for axis, size in enumerate(sizes)]

    def call(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        """A copy of the node with other arguments."""
        copy = self.graph.call_function(node.target, args, kwargs)
        copy.meta["val"] = node.meta["val"]
        return copy


def _flat(value: Tensor, part: _Part, node: Any) -> Tensor:
    """A tensor in the form in which its node crosses, [1, T, …]."""
    (axis,) = part.rows_of(node)
    if part.edges.shape(node) == tuple(node.meta["val"].shape):
        return value
    return value.movedim(axis, 0).reshape(1, -1, int(part.edges.shape(node)[2]))


# A rule copies a node by whose the axes of its result are.


def _pointwise(part: _Part, node: Any, labels: _Labels) -> Any:
    rank = part.rank(node)

    def own(source: Any) -> Any:
        if not is_tensor(source):
            raise NotUnderstood(f"{node.target} takes a number that follows from how many tokens there are")
        more = rank - part.rank(source)
        return part.source(source, {axis - more: kind for axis, kind in labels.items()})

    args, kwargs = fx.map_arg((node.args, node.kwargs), own)
    return part.call(node, *args, **kwargs)


def _expand(part: _Part, node: Any, labels: _Labels) -> Any:
    more = part.rank(node) - part.rank(node.args[0])
    source = part.source(node.args[0], {axis - more: kind for axis, kind in labels.items()})
    return part.call(node, source, part.numbers(node.args[1], labels))


def _filled(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _arange(part: _Part, node: Any, labels: _Labels) -> Any:
    start = 0 if is_call(node, aten.arange.default) else node.args[0]
    step = node.args[2] if len(node.args) > 2 else 1
    value = node.meta["val"]
    if not labels:
        return part.call(node, *node.args, **node.kwargs)
    if not isinstance(start, int) or step != 1 or expression(value.shape[0]) != part.positions.symbol:
        raise NotUnderstood(f"{node.target} counts otherwise than the tokens")
    return part.counted(labels[0], start, value.dtype, node)


def _matmul(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _over(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _reduced(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _view(part: _Part, node: Any, labels: _Labels) -> Any:
    """Rows stay in order: the axes with rows are those of the source, one for one."""
    source = node.args[0]
    rows = part.rows_of(source)
    if len(rows) != len(labels):
        raise NotUnderstood(f"{node.target} joins queries and keys")
    given = part.source(source, dict(zip(rows, labels.values(), strict=True)))
    if is_call(node, aten.flatten.using_ints):
        return part.call(node, given, *node.args[1:])
    return part.call(node, given, part.numbers(node.args[1], labels))


def _transpose(part: _Part, node: Any, labels: _Labels) -> Any:
    rank = part.rank(node)
    a, b = (int(dim) % rank for dim in node.args[1:3])
    swapped = {a: b, b: a}
    source = part.source(node.args[0], {swapped.get(axis, axis): kind for axis, kind in labels.items()})
    return part.call(node, source, *node.args[1:])


def _permute(part: _Part, node: Any, labels: _Labels) -> Any:
    order = [int(dim) % part.rank(node) for dim in node.args[1]]
    source = part.source(node.args[0], {order[axis]: kind for axis, kind in labels.items()})
    return part.call(node, source, *node.args[1:])


def _unsqueeze(part: _Part, node: Any, labels: _Labels) -> Any:
    new = int(node.args[1]) % part.rank(node)
    source = part.source(node.args[0], {axis - (axis > new): kind for axis, kind in labels.items()})
    return part.call(node, source, *node.args[1:])


def _without(part: _Part, node: Any, labels: _Labels) -> Any:
    """One axis fewer, if it is gone: a place of it is selected, or it had one place."""
    rank = part.rank(node.args[0])
    gone = int(node.args[1]) % rank
    fewer = part.rank(node) < rank
    found = {axis + (fewer and axis >= gone): kind for axis, kind in labels.items()}
    return part.call(node, part.source(node.args[0], found), *node.args[1:])


def _slice(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _along(part: _Part, node: Any, labels: _Labels) -> Any:
    """Tensors of the same axes are joined, read or written along one of them, which is of keys if it is one of rows."""
    dim = _dim(node, part.rank(node))
    if is_call(node, aten.cat.default):
        if labels.get(dim, KEY) != KEY:
            raise NotUnderstood("queries are joined with others")
        return part.call(node, [part.source(one, labels) for one in node.args[0]], *node.args[1:])
    args = [part.source(one, labels | {dim: KEY}) if is_tensor(one) else one for one in node.args]
    return part.call(node, *args, **node.kwargs)


def _triangle(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _repeat(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _linear(part: _Part, node: Any, labels: _Labels) -> Any:
    if part.rank(node) - 1 in labels:
        raise NotUnderstood("a linear is over the rows")
    return part.call(node, part.source(node.args[0], labels), *(part.source(w, {}) for w in node.args[1:]))


def _embedding(part: _Part, node: Any, labels: _Labels) -> Any:
    return part.call(node, part.source(node.args[0], {}), part.source(node.args[1], labels))


def _lookup(part: _Part, node: Any, labels: _Labels) -> Any:
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


def _masked(part: _Part, node: Any, labels: _Labels) -> Any:
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


_Rule = Callable[[_Part, Any, _Labels], Any]
_OPERATORS: dict[_Rule, tuple[Any, ...]] = {
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
_RULES: dict[Any, _Rule] = {target: rule for rule, targets in _OPERATORS.items() for target in targets}
