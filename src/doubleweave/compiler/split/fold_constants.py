"""Compute the results of a segment without inputs once, at compile time."""

from __future__ import annotations

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import insert, output_node
from doubleweave.compiler.split.pieces import with_weights
from doubleweave.compiler.split.transform import over_empty_weights
from doubleweave.compiler.split.weights import Convert, Weights


def is_constant(graph_module: fx.GraphModule) -> bool:
    """Whether a structure has no inputs and draws no random numbers, so that its results are the same each time."""
    return not any(
        node.op == "placeholder" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for node in graph_module.graph.nodes
    )


def fold(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """A structure that returns its weights, and a function that computes them from the old structure's weights."""
    (results,) = output_node(graph_module.graph).args
    graph = fx.Graph()
    copies = []
    for index, result in enumerate(results):
        weight = graph.get_attr(f"w{index}")
        weight.meta["val"] = result.meta["val"]
        copies.append(insert(graph, torch.ops.aten.clone.default, weight, like=result))
    graph.output(tuple(copies))

    def convert(weights: Weights) -> Weights:
        with torch.no_grad():
            return tuple(result.clone() for result in with_weights(graph_module.graph, weights)())

    return over_empty_weights(graph), convert
