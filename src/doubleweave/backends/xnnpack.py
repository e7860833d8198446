"""The XNNPACK backend: the default on every CPU, and the stand-in for an NPU where there is none.

Rewrites what XNNPACK's partitioner would leave outside its delegate, and says which partitioner and
compile options to use. It knows nothing of models or schedules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.simplify import insert, is_call, nodes_of

NAME = "xnnpack"

aten = torch.ops.aten

_Weights = tuple[Tensor, ...]


def prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Callable[[_Weights], _Weights]]:
    """Rewrite a structure for XNNPACK; returns the graph and what it does to a segment's weights.

    RMSNorm's mean over the last dim is not delegated and would cut the segment in two; as a linear onto
    one feature with the weights 1/n it is.
    """
    graph = fx.Graph()
    copied: dict[Any, Any] = {}
    graph.output(graph.graph_copy(graph_module.graph, copied))
    for old, new in copied.items():
        new.meta = dict(old.meta)
    num_weights = len({node.target for node in graph.nodes if node.op == "get_attr"})
    added: list[int] = []
    for node in nodes_of(graph):
        if not (is_call(node, aten.mean.dim) and list(node.args[1]) == [-1] and len(node.args) > 2):
            continue
        if not node.args[2] or node.meta["val"].dtype != torch.float32:
            continue
        width = int(node.args[0].meta["val"].shape[-1])
        if width not in added:
            added.append(width)
        with graph.inserting_before(node):
            ones = graph.get_attr(f"w{num_weights + added.index(width)}")
            ones.meta["val"] = node.meta["val"].fake_mode.from_tensor(
                torch.empty(1, width), static_shapes=True
            )
            mean = insert(graph, aten.linear.default, node.args[0], ones, like=node)
        node.replace_all_uses_with(mean)
        graph.erase_node(node)
    root = torch.nn.Module()
    for node in nodes_of(graph):
        if node.op == "get_attr":
            like = node.meta["val"]
            root.register_buffer(node.target, torch.empty(tuple(map(int, like.shape)), dtype=like.dtype))

    def convert(weights: _Weights) -> _Weights:
        return (*weights, *(torch.full((1, width), 1.0 / width) for width in added))

    return fx.GraphModule(root, graph), convert


def partitioners() -> list[object]:
    """One partitioner for everything: with the dynamically quantized one listed first, as is usual, each
    linear becomes a delegate of its own; the numbers and the speed are the same, lowering takes longer."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]
