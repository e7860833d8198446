"""Drop what makes a tensor as long as the one that it is combined with: operators broadcast by themselves.

A bias that is expanded to a row for each token, or the embedding of as many zeros, would be made from the number of
rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import insert, is_call, is_tensor, nodes_of, replace_nodes, same_shape

aten = torch.ops.aten

_BROADCASTING = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_EXPANDING = (aten.expand.default, aten.expand_as.default)
_FILLED: dict[Any, int] = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
}


def drop_expands(graph_module: fx.GraphModule) -> None:
    """`x + bias.expand_as(x)` -> `x + bias`; embeddings of indices that are all the same are one row, expanded."""

    def one_row(node: Any) -> Any:
        index = _number_everywhere(node.args[1]) if is_call(node, aten.embedding.default) else None
        if index is None:
            return None
        graph, shape = graph_module.graph, node.args[1].meta["val"].shape
        row = insert(graph, aten.select.int, node.args[0], 0, index, like=node)
        sizes = [
            insert(graph, aten.sym_size.int, node.args[1], axis, like=node) if str(size) != "1" else 1
            for axis, size in enumerate(shape)
        ]
        return insert(graph, aten.expand.default, row, [*sizes, -1], like=node)

    replace_nodes(graph_module.graph, one_row)
    for node in nodes_of(graph_module.graph):
        if is_call(node, *_EXPANDING):
            for user in list(node.users):
                if is_call(user, *_BROADCASTING) and _keeps_its_shape(user, node):
                    user.replace_input_with(node, node.args[0])
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _number_everywhere(node: Any) -> int | None:
    """The number that a tensor is filled with, None where that is not plain."""
    if is_call(node, aten.full.default, aten.full_like.default) and isinstance(node.args[1], (int, float)):
        return int(node.args[1])
    if is_call(node, aten.expand.default, aten.slice.Tensor, aten.to.dtype, aten.clone.default):
        return _number_everywhere(node.args[0])
    return _FILLED.get(node.target) if isinstance(node, fx.Node) else None


def _keeps_its_shape(user: Any, expanded: Any) -> bool:
    others = [arg for arg in user.args[:2] if is_tensor(arg) and arg is not expanded]
    return any(same_shape(other.meta["val"], user.meta["val"]) for other in others)
