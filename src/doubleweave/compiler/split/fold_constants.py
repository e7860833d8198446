"""Compute once, at compile time, what a segment without inputs computes."""

from __future__ import annotations

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import output_node
from doubleweave.compiler.split.pieces import with_weights
from doubleweave.compiler.split.transform import Convert, Weights, over_empty_weights


def is_constant(graph_module: fx.GraphModule) -> bool:
    """Whether a structure gives the same results each time: it has no inputs and draws no random numbers."""
    return not any(
        node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in graph_module.graph.nodes
    )


def fold(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """A structure whose weights are the results of this one, and what it makes of a segment's weights."""
    (results,) = output_node(graph_module.graph).args
    graph = fx.Graph()
    copies = []
    for index, result in enumerate(results):
        weight = graph.get_attr(f"w{index}")
        weight.meta["val"] = result.meta["val"]
        copy = graph.call_function(torch.ops.aten.clone.default, (weight,))
        copy.meta["val"] = result.meta["val"]
        copies.append(copy)
    graph.output(tuple(copies))

    def convert(weights: Weights) -> Weights:
        with torch.no_grad():
            return tuple(result.clone() for result in with_weights(graph_module.graph, weights)())

    return over_empty_weights(graph), convert
