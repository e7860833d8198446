"""What the weights of a split's linears and tables are kept in: counted for whoever inspects a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED
from doubleweave.compiler.graph.nodes import is_call, nodes_of
from doubleweave.compiler.graph.table_ops import TABLE_ROWS
from doubleweave.compiler.quantize.formats import INT4, INT4_OFFSETS, INT8
from doubleweave.compiler.quantize.roles import WEIGHT_OF, roles_of
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import Stored

aten = torch.ops.aten
ours = torch.ops.doubleweave
TABLE = "table"  # the role of what rows are looked up in


def with_stored(torch_split: TorchSplit) -> TorchSplit:
    """The split whose segments without a recipe of their own say what their weights are kept in."""
    roles = roles_of(torch_split)
    segments = (
        segment
        if segment.recipe
        else replace(
            segment, stored=_stored(torch_split.graphs[segment.structure].graph, roles[segment.name])
        )
        for segment in torch_split.split.segments
    )
    return replace(torch_split, split=replace(torch_split.split, segments=tuple(segments)))


def _stored(graph: fx.Graph, roles: Mapping[str, str]) -> tuple[Stored, ...]:
    """How many weights of linears and tables a graph reads by role and format, in the order of the graph."""
    counts: Counter[tuple[str, str]] = Counter()
    for node in nodes_of(graph):
        if is_call(node, TABLE_ROWS):
            table, scales, _, offsets, _ = node.args
            name = "bfloat16" if scales is None else INT8.name if offsets is None else INT4_OFFSETS.name
            counts[TABLE, name] += table.meta["val"].numel() * (1 if offsets is None else 2)
        elif is_call(node, aten.embedding.default):
            if node.args[0].op == "get_attr":
                counts[TABLE, _dtype(node.args[0])] += node.args[0].meta["val"].numel()
        elif is_call(node, *WEIGHT_OF):
            weight, *parts = node.args[WEIGHT_OF[node.target] :]
            if weight.op != "get_attr":  # of an operator that makes float32 of it
                weight = next(iter(weight.all_input_nodes), None) if weight.op == "call_function" else None
            if weight is not None:
                counts[roles[node.name], _format(node, weight, parts)] += weight.meta["val"].numel()
    return tuple(Stored(*names, weights) for names, weights in counts.items())


def _format(node: Any, weight: Any, parts: list[Any]) -> str:
    if not is_call(node, LINEAR_QUANTIZED, ours.expert_linear_quantized.default):
        return _dtype(weight)
    scales, offsets = (*parts, None)[:2]
    if scales.meta["val"].ndim < weight.meta["val"].ndim:
        return INT8.name
    return INT4.name if offsets is None else INT4_OFFSETS.name


def _dtype(weight: Any) -> str:
    return str(weight.meta["val"].dtype).removeprefix("torch.")
