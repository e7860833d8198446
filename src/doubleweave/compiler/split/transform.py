"""Rewrite the graphs of a split and convert every segment's weights with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import fx

from doubleweave.compiler.split.pieces import TorchSplit, derived_structure
from doubleweave.compiler.split.weights import Convert, MadeWeights

_Variant = TypeVar("_Variant")


def transform_segments(
    torch_split: TorchSplit,
    transform: Callable[[fx.GraphModule], tuple[fx.GraphModule, Convert]],
    names: frozenset[str] | None = None,
) -> TorchSplit:
    """Rewrite the structures of the named segments (None: of all), each structure once.

    `transform` returns the new graph and a function from a segment's old weights to the new graph's, which is called
    when somebody asks for them.
    """
    found = (s.name for s in torch_split.split.segments) if names is None else names
    return transform_variants(torch_split, lambda graph, _: transform(graph), dict.fromkeys(found, ()))


def transform_variants(
    torch_split: TorchSplit,
    transform: Callable[[fx.GraphModule, _Variant], tuple[fx.GraphModule, Convert]],
    variants: Mapping[str, _Variant],
) -> TorchSplit:
    """`transform_segments` of the segments that `variants` names, whose graphs differ by their variant as well.

    Segments of one structure and one variant stay of one structure. An empty variant leaves the structure its name.
    """
    graphs = dict(torch_split.graphs)
    made: dict[str, Convert] = {}
    convert: dict[str, Convert] = {}
    segments = []
    for segment in torch_split.split.segments:
        if segment.name in variants:
            variant = variants[segment.name]
            structure = derived_structure(segment.structure, variant) if variant else segment.structure
            if structure not in made:
                graphs[structure], made[structure] = transform(torch_split.graphs[segment.structure], variant)
            convert[segment.name] = made[structure]
            segment = replace(segment, structure=structure)
        segments.append(segment)
    split = replace(torch_split.split, segments=tuple(segments))
    used = {segment.structure: graphs[segment.structure] for segment in segments}
    return replace(torch_split, split=split, graphs=used, weights=MadeWeights(torch_split.weights, convert))


def copy_graph(graph_module: fx.GraphModule) -> fx.Graph:
    """A copy of a structure's graph to rewrite, with the meta of each node."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return graph


def number_weights(graph: fx.Graph) -> list[str]:
    """Name the weights "w0", "w1", … in the order in which the graph reads them; returns their names before."""
    names: list[str] = []
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in names:
            names.append(node.target)
        node.target = f"w{names.index(node.target)}"
    return names


def over_empty_weights(graph: fx.Graph) -> fx.GraphModule:
    """A rewritten graph over uninitialised buffers in the shapes of its get_attr nodes."""
    # A structure's graph serves segments of other weights: the numbers are in TorchSplit.weights.
    root = torch.nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        like = node.meta["val"]
        root.register_buffer(node.target, torch.empty(tuple(map(int, like.shape)), dtype=like.dtype))
    return fx.GraphModule(root, graph)
