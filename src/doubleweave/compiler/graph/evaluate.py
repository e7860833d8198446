"""Compute nodes of an exported graph for so many rows, from positions, constants, and values that are given.

Masks, biases and rotary embedding are understood from what they compute, whatever operators they are made of. This
module knows nothing of what its callers look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import constant, expression, is_call, is_tensor
from doubleweave.compiler.graph.positions import num_rows

aten = torch.ops.aten

# Made like another tensor, of which they read the size alone.
SIZE_ONLY = (
    *(aten.ones_like.default, aten.zeros_like.default, aten.full_like.default, aten.empty_like.default),
    *(aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.new_empty.default),
)


OTHER_ROWS = 7  # of another sequence than the graph's, such as an encoder's


class Evaluator:
    """Computes nodes of one graph; `symbol` is the number of its rows, an expression."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.module = graph_module
        self.symbol = num_rows(graph_module.graph)

    def size(self, value: Any, rows: int) -> int:
        found = expression(value).subs(self.symbol, rows)
        return int(found.subs(dict.fromkeys(found.free_symbols, OTHER_ROWS)))

    def values(
        self, nodes: Iterable[fx.Node], rows: int, given: Mapping[fx.Node, Tensor]
    ) -> dict[fx.Node, Any]:
        """The values of `nodes`, and of all they need, with so many rows at positions 0, 1, …; `given` are known."""
        found: dict[Any, Any] = dict(given)
        for node in self.needed(nodes, given):
            if node not in found:
                found[node] = self._value(node, rows, found)
        return found

    def _value(self, node: fx.Node, rows: int, found: Mapping[Any, Any]) -> Any:
        value = node.meta.get("val")
        if node.op == "placeholder":
            return torch.arange(rows).unsqueeze(0)
        if node.op == "get_attr":
            return constant(self.module, node)
        if isinstance(value, (int, torch.SymInt)):
            return self.size(value, rows)
        if is_call(node, *SIZE_ONLY):
            like: Any = node.args[0].meta["val"]  # type: ignore[union-attr]
            sizes, kwargs = fx.map_arg((node.args[1:], node.kwargs), lambda n: found[n])
            args = (torch.empty([self.size(s, rows) for s in like.shape], dtype=like.dtype), *sizes)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: found[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def needed(self, nodes: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[fx.Node]:
        """`nodes` and what they are computed from, each behind its sources."""
        order: dict[fx.Node, None] = {}
        todo = [(node, False) for node in nodes]
        while todo:
            node, is_ready = todo.pop()
            if is_ready:
                order[node] = None
            elif node not in order:
                todo.append((node, True))
                todo += [(source, False) for source in self._sources(node, given)]
        return list(order)

    def _sources(self, node: fx.Node, given: Mapping[fx.Node, Any]) -> list[fx.Node]:
        if node in given or (not is_tensor(node) and isinstance(node.meta.get("val"), (int, torch.SymInt))):
            return []
        sources = node.all_input_nodes
        return [s for s in sources if not is_tensor(s)] if is_call(node, *SIZE_ONLY) else sources
