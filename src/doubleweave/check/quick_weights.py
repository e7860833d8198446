"""Quantized segments in eager torch that make float32 of their weights a few output features at a time: a head's are
gigabytes. The results are the same bit for bit. Knows nothing of language models.
"""

from __future__ import annotations

from torch import Tensor, fx

from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED, dequantized, on_grids
from doubleweave.compiler.graph.nodes import is_call, nodes_of
from doubleweave.compiler.split.pieces import SegmentModules, TorchSplit
from doubleweave.compiler.split.transform import copy_graph
from doubleweave.sources.file_weights import FEATURES, linear_in_blocks


def quick_modules(torch_split: TorchSplit) -> SegmentModules:
    """By segment, a function of what `TorchSplit.module` takes."""
    return SegmentModules(
        torch_split, {name: _rewritten(module) for name, module in torch_split.graphs.items()}
    )


def _rewritten(module: fx.GraphModule) -> fx.Graph:
    graph = copy_graph(module)
    for node in nodes_of(graph):
        if is_call(node, LINEAR_QUANTIZED):
            node.target = quantized_product
    graph.eliminate_dead_code()
    return graph


def quantized_product(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    offset_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear_quantized`, some output features at a time."""
    blocks = (slice(start, start + FEATURES) for start in range(0, len(values), FEATURES))
    weights = (
        dequantized(
            values[rows],
            scales[rows],
            None if offsets is None else offsets[rows],
            None if offset_scales is None else offset_scales[rows],
        )[:, : x.shape[-1]]
        for rows in blocks
    )
    return linear_in_blocks(on_grids(x), weights, len(values), bias)
