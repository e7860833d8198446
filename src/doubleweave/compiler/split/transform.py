"""Rewrite the graphs of a split, each structure once, and carry every segment's weights over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import Segment

Weights = tuple[Tensor, ...]
# Turns a segment's old weights into the new graph's.
Convert = Callable[[Weights], Weights]


def transform_segments(
    torch_split: TorchSplit,
    transform: Callable[[fx.GraphModule], tuple[fx.GraphModule, Convert]],
    names: frozenset[str] | None = None,
) -> TorchSplit:
    """Rewrite the structures of the named segments (None: of all)."""
    graphs: dict[str, fx.GraphModule] = {}
    weights: dict[str, Weights] = {}
    convert: dict[str, Convert] = {}
    segments: list[Segment] = []
    for segment in torch_split.split.segments:
        old = segment.structure
        if names is not None and segment.name not in names:
            graphs[old] = torch_split.graphs[old]
            weights[segment.name] = torch_split.weights[segment.name]
            segments.append(segment)
            continue
        if old not in convert:
            graphs[old], convert[old] = transform(torch_split.graphs[old])
        weights[segment.name] = convert[old](torch_split.weights[segment.name])
        segments.append(segment)
    return TorchSplit(replace(torch_split.split, segments=tuple(segments)), graphs, weights)


def copy_graph(graph_module: fx.GraphModule) -> fx.Graph:
    """A copy of a structure's graph to rewrite, with what torch.export noted at each node."""
    graph = fx.Graph()
    copied: dict[Any, Any] = {}
    graph.output(graph.graph_copy(graph_module.graph, copied))
    for old, new in copied.items():
        new.meta = dict(old.meta)
    return graph


def over_empty_weights(graph: fx.Graph) -> fx.GraphModule:
    """A rewritten graph over uninitialised buffers of the shapes that its get_attr nodes say."""
    root = torch.nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr" and not hasattr(root, str(node.target)):
            like = node.meta["val"]
            root.register_buffer(node.target, torch.empty(tuple(map(int, like.shape)), dtype=like.dtype))
    return fx.GraphModule(root, graph)
