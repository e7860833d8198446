"""Rotary embedding in plain operators, for backends that do not know ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph import ops as _ops  # noqa: F401  registers doubleweave::rotary
from doubleweave.compiler.graph.nodes import insert, is_call, replace_nodes
from doubleweave.compiler.split.transform import copy_graph, over_empty_weights
from doubleweave.compiler.split.weights import Convert

aten = torch.ops.aten
_rotary = torch.ops.doubleweave.rotary.default


def without_rotary(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """A structure with plain operators in the place of rotary embedding, over the same weights."""
    graph = copy_graph(graph_module)
    replace_rotary(graph)
    return over_empty_weights(graph), lambda weights: weights


def replace_rotary(graph: fx.Graph) -> None:
    """Put plain operators in the place of every doubleweave::rotary. Sizes of rows are left to be worked out (-1)."""
    replace_nodes(graph, lambda node: _plain_rotary(graph, node) if is_call(node, _rotary) else None)


def _plain_rotary(graph: fx.Graph, node: Any) -> Any:
    """ops.rotary_reference, operator by operator."""
    x, cos, sin, num_heads = node.args
    width = int(x.meta["val"].shape[-1])
    num_rotary = int(cos.meta["val"].shape[-1])
    head_dim, half = width // num_heads, num_rotary // 2

    def add(target: Any, *args: Any) -> Any:
        return insert(graph, target, *args, like=node)

    def part(source: Any, start: int, end: int) -> Any:
        return add(aten.slice.Tensor, source, 3, start, end)

    x_BTHD = add(aten.view.default, x, [1, -1, num_heads, head_dim])
    turned = x_BTHD if num_rotary == head_dim else part(x_BTHD, 0, num_rotary)
    swapped = add(
        aten.cat.default, [add(aten.neg.default, part(x_BTHD, half, num_rotary)), part(x_BTHD, 0, half)], 3
    )
    straight = add(aten.mul.Tensor, turned, add(aten.unsqueeze.default, cos, 2))
    across = add(aten.mul.Tensor, swapped, add(aten.unsqueeze.default, sin, 2))
    out = add(aten.add.Tensor, straight, across)
    if num_rotary != head_dim:
        out = add(aten.cat.default, [out, part(x_BTHD, num_rotary, head_dim)], 3)
    return add(aten.view.default, out, [1, -1, width])
