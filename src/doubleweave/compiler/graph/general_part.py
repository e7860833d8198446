"""The part of a graph in which queries and keys meet, copied to a graph of its own.

Every axis of the part that has rows in its size is told apart, from the result backwards: it counts queries or keys.
What follows from one row alone is an input, and what is of keys is cached. It knows the sizes and the inputs of the
copy; how an operator is copied its rule says (general_rules.py).

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
from doubleweave.compiler.graph.nodes import LAYOUT, expression, insert, is_call
from doubleweave.compiler.graph.position_bias import Bias, NotUnderstood, Positions, bias_of
from doubleweave.compiler.graph.positions import POSITIONS, placeholder_of
from doubleweave.compiler.graph.sizes import larger, smaller

aten = torch.ops.aten

_BIAS = "bias"  # in a mask's meta: what it hides
QUERY, KEY = "query", "key"
Axes = tuple[str, ...]  # of each axis that has rows in its size, in order: whose they are
Labels = dict[int, str]  # the same by axis
Rule = Callable[["Part", Any, Labels], Any]  # copies a node by whose the axes of its result are
RuleOf = Callable[[Any], Rule | None]

# What lays one row's numbers out anew: the rows behind it are what is cached.
_LAYOUT = LAYOUT - {aten.slice.Tensor, aten.select.int} | {
    *(aten._unsafe_view.default, aten.repeat_interleave.self_int),
}
_ARITHMETIC = {"Min": smaller, "Max": larger, "Add": operator.add, "Mul": operator.mul}
_TRIED = (5, 41)  # rows: fewer than an index chooses, perhaps, and more
_SEED = 20263


class Part:
    """The graph of the part: its inputs are `leaves[QUERY]`, `leaves[KEY]` and `weights`, nodes of the whole graph."""

    def __init__(
        self, graph_module: fx.GraphModule, positions: Positions, edges: Edges, rule_of: RuleOf
    ) -> None:
        self.module = graph_module
        self.rule_of = rule_of
        self.positions = positions
        self.edges = edges
        self.graph = fx.Graph()
        self.leaves: dict[str, list[Any]] = {QUERY: [], KEY: []}
        self.weights: list[Any] = []
        self._inputs: dict[Any, Any] = {}  # placeholders by (node, whose)
        self._done: dict[tuple[Any, Axes], Any] = {}
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
            wanted = self._flat(self.positions.values([node], rows, given)[node], node)
            queries, keys = (
                [self._flat(given[leaf], leaf) for leaf in self.leaves[kind]] for kind in (QUERY, KEY)
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

    def emit(self, node: Any, axes: Axes) -> Any:
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

    def _emit(self, node: Any, axes: Axes) -> Any:
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

    def _copy(self, node: Any, axes: Axes) -> Any:
        labels = dict(zip(self.rows_of(node), axes, strict=True))
        if node in self.positions.nodes and (bias := self._bias(node, labels)) is not None:
            return self._mask(bias, node)
        rule = self.rule_of(node)
        if rule is None:
            raise NotUnderstood(f"queries and keys meet in {node.target}")
        return rule(self, node, labels)

    def _bias(self, node: Any, labels: Labels) -> Bias | None:
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

    def _leaf(self, node: Any, axes: Axes) -> Any:
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

    def numbers(self, sizes: Sequence[Any], labels: Labels) -> list[Any]:
        """Sizes of a result, axis by axis."""
        return [self.number(size, labels.get(axis, "")) for axis, size in enumerate(sizes)]

    def call(self, node: Any, *args: Any, **kwargs: Any) -> Any:
        """A copy of the node with other arguments."""
        copy = self.graph.call_function(node.target, args, kwargs)
        copy.meta["val"] = node.meta["val"]
        return copy

    def _flat(self, value: Tensor, node: Any) -> Tensor:
        """A tensor in the form in which its node crosses, [1, T, …]."""
        (axis,) = self.rows_of(node)
        if self.edges.shape(node) == tuple(node.meta["val"].shape):
            return value
        return value.movedim(axis, 0).reshape(1, -1, int(self.edges.shape(node)[2]))
