"""Quantized segments in eager torch that make float32 of their weights in less time and memory.

torch's own operators subtract the zero points in int64, eight bytes a weight. The results are the same bit for bit.
Knows nothing of language models.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED, dequantized, on_grids
from doubleweave.compiler.graph.nodes import is_call, nodes_of
from doubleweave.compiler.quantize.formats import dequantize
from doubleweave.compiler.split.pieces import SegmentModules, TorchSplit
from doubleweave.compiler.split.transform import copy_graph
from doubleweave.sources.file_weights import FEATURES, linear_in_blocks

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed


def quick_modules(torch_split: TorchSplit) -> SegmentModules:
    """By segment, a function of what `TorchSplit.module` takes."""
    return SegmentModules(
        torch_split, {name: _rewritten(module) for name, module in torch_split.graphs.items()}
    )


def _rewritten(module: fx.GraphModule) -> fx.Graph:
    graph = copy_graph(module)
    for node in nodes_of(graph):
        # A weight of int8 with zero points has 9 bits: exact in float32, as in int64.
        if (
            is_call(node, qd.dequantize_per_channel.default)
            and node.args[3] == 0
            and not node.kwargs
            and node.args[0].op == "get_attr"
            and torch.int8 in node.args
        ):
            node.target, node.args = dequantize, node.args[:3]
    for node in nodes_of(graph):
        if is_call(node, aten.linear.default) and is_call(node.args[1], dequantize):
            x, weight, *bias = node.args
            node.target, node.args = product, (x, *weight.args, *bias)
        elif is_call(node, LINEAR_QUANTIZED):
            node.target = quantized_product
    graph.eliminate_dead_code()
    return graph


def product(
    x: Tensor, values: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """`linear` over what `dequantize` gives of [N, K], some output features at a time: a head's are gigabytes."""
    return _in_blocks(dequantize, x, bias, values, scales, zero_points)


def quantized_product(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    offset_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear_quantized`, some output features at a time."""
    return _in_blocks(dequantized, on_grids(x), bias, values, scales, offsets, offset_scales)


def _in_blocks(
    exact: Callable[..., Tensor], x: Tensor, bias: Tensor | None, values: Tensor, *parts: Tensor | None
) -> Tensor:
    blocks = (slice(start, start + FEATURES) for start in range(0, len(values), FEATURES))
    weights = (
        exact(values[rows], *(None if part is None else part[rows] for part in parts)) for rows in blocks
    )
    return linear_in_blocks(x, weights, len(values), bias)
