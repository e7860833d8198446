"""Join attentions over the same queries and keys into one, over their values side by side.

Differential attention (DiffLlama) attends twice with the same weights. Each layer's keys are then one cache, read once.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.fx.passes.tools_common import legalize_graph

from doubleweave.compiler.graph.nodes import insert
from doubleweave.compiler.graph.ops import ATTENTIONS

aten = torch.ops.aten


def join_shared(graph_module: fx.GraphModule) -> None:
    """attention(q, k, v1) and attention(q, k, v2) become attention(q, k, v), each kv head of v being v1's and v2's."""
    same: dict[Any, list[Any]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.target in ATTENTIONS:
            same[(node.target, *node.args[:2], *node.args[3:])].append(node)
    shared = [nodes for nodes in same.values() if len(nodes) > 1]
    for nodes in shared:
        _join(graph_module.graph, nodes)
    if shared:
        legalize_graph(graph_module)  # what reads the first result may stand before the last values
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()


def _join(graph: fx.Graph, nodes: list[Any]) -> None:
    first, last = nodes[0], nodes[-1]
    num_heads, num_kv_heads = first.args[3:5]
    widths = [int(node.args[2].meta["val"].shape[2]) // num_kv_heads for node in nodes]
    with graph.inserting_before(last):
        num_tokens = insert(graph, aten.sym_size.int, first.args[0], 1, like=first)
        heads = [
            insert(graph, aten.view.default, node.args[2], [1, num_tokens, num_kv_heads, width], like=first)
            for node, width in zip(nodes, widths, strict=True)
        ]
        joined = insert(graph, aten.cat.default, heads, -1, like=first)
        sizes = [1, num_tokens, num_kv_heads * sum(widths)]
        value = insert(graph, aten.reshape.default, joined, sizes, like=first)
        out = insert(graph, first.target, *first.args[:2], value, *first.args[3:], like=first)
        by_head = insert(graph, aten.view.default, out, [1, num_tokens, num_heads, sum(widths)], like=first)
        start = 0
        for node, width in zip(nodes, widths, strict=True):
            part = insert(graph, aten.slice.Tensor, by_head, 3, start, start + width, like=first)
            flat = insert(graph, aten.reshape.default, part, [1, num_tokens, num_heads * width], like=first)
            node.replace_all_uses_with(flat)
            start += width
