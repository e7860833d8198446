"""Join permutes with what they permute, and make those that swap two axes transposes: later passes know no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import insert, is_call, replace_nodes

aten = torch.ops.aten


def join_permutes(graph_module: fx.GraphModule) -> None:
    """Each permute becomes a transpose or nothing where it can."""

    def joined(node: Any) -> Any:
        order = _order(node)
        if order is None:
            return None
        source = node.args[0]
        before = _order(source)
        if node.target is aten.transpose.int and (before is None or source.target is aten.transpose.int):
            return None
        if before is not None:
            source, order = source.args[0], [before[axis] for axis in order]
        moved = [axis for axis, found in enumerate(order) if axis != found]
        if not moved:
            return source
        if len(moved) == 2:
            return insert(graph_module.graph, aten.transpose.int, source, *moved, like=node)
        return insert(graph_module.graph, aten.permute.default, source, order, like=node)

    replace_nodes(graph_module.graph, joined)
    graph_module.recompile()


def _order(node: Any) -> list[int] | None:
    """The axis of the input that each axis of the result is, None for other operators."""
    if not is_call(node, aten.permute.default, aten.transpose.int):
        return None
    rank = len(node.meta["val"].shape)
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in node.args[1]]
    order = list(range(rank))
    a, b = (int(axis) % rank for axis in node.args[1:3])
    order[a], order[b] = order[b], order[a]
    return order
