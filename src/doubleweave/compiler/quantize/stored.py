"""What the weights of a split's linears and tables are kept in: counted for whoever inspects a program."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED
from doubleweave.compiler.graph.nodes import is_call, nodes_of
from doubleweave.compiler.graph.table_ops import TABLE_ROWS
from doubleweave.compiler.quantize.formats import INT4, INT4_OFFSETS, INT8
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import Stored

aten = torch.ops.aten
ours = torch.ops.doubleweave
# Where an operator has its weight, and behind it the weight's scales and offsets.
_WEIGHT = {
    aten.linear.default: 1,
    aten.embedding.default: 0,
    LINEAR_QUANTIZED: 1,
    ours.expert_linear.default: 2,
    ours.expert_linear_quantized.default: 2,
}


def with_stored(torch_split: TorchSplit) -> TorchSplit:
    """The split whose segments without a recipe of their own say what their weights are kept in."""
    without_recipe = {segment.structure for segment in torch_split.split.segments if not segment.recipe}
    found = {structure: stored(torch_split.graphs[structure].graph) for structure in without_recipe}
    segments = (
        segment if segment.recipe else replace(segment, stored=found[segment.structure])
        for segment in torch_split.split.segments
    )
    return replace(torch_split, split=replace(torch_split.split, segments=tuple(segments)))


def stored(graph: fx.Graph) -> tuple[Stored, ...]:
    """How many weights of linears and tables a graph reads in each format, the most first."""
    counts: Counter[str] = Counter()
    for node in nodes_of(graph):
        if is_call(node, TABLE_ROWS):
            table, scales, _, offsets, _ = node.args
            name = "bfloat16" if scales is None else INT8.name if offsets is None else INT4_OFFSETS.name
            counts[name] += table.meta["val"].numel() * (1 if offsets is None else 2)
        elif is_call(node, *_WEIGHT):
            weight, *parts = node.args[_WEIGHT[node.target] :]
            if weight.op == "get_attr":
                counts[_format(node, weight, parts)] += weight.meta["val"].numel()
            elif is_call(node, aten.linear.default) and weight.all_input_nodes:
                values = weight.all_input_nodes[0].meta["val"]  # of an operator that makes float32 of them
                counts[str(values.dtype).removeprefix("torch.")] += values.numel()
    return tuple(Stored(*item) for item in counts.most_common())


def _format(node: Any, weight: Any, parts: list[Any]) -> str:
    if not is_call(node, LINEAR_QUANTIZED, ours.expert_linear_quantized.default):
        return str(weight.meta["val"].dtype).removeprefix("torch.")
    scales, offsets = (*parts, None)[:2]
    if scales.meta["val"].ndim < weight.meta["val"].ndim:
        return INT8.name
    return INT4.name if offsets is None else INT4_OFFSETS.name
