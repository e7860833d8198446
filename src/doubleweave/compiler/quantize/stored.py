"""What the weights of a split's linears and tables are kept in: counted for whoever inspects a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.linear_ops import GROUP_SIZE, LINEAR_QUANTIZED, LINEAR_ROWS
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
            counts[TABLE, name] += len(table.meta["val"]) * _width(node)
        elif is_call(node, LINEAR_ROWS):
            _, weight, *parts = node.args
            counts[TABLE, _grouped(weight, parts)] += len(weight.meta["val"]) * _width(node)
        elif is_call(node, aten.embedding.default) and node.args[0].op == "get_attr":
            counts[TABLE, _dtype(node.args[0])] += node.args[0].meta["val"].numel()
        elif is_call(node, *WEIGHT_OF):
            weight, *parts = node.args[WEIGHT_OF[node.target] :]
            if weight.op == "get_attr":
                # Those of 8 bits have zeros up to a whole group.
                features = weight.meta["val"].shape[:-1].numel()
                counts[roles[node.name], _format(node, weight, parts)] += features * _width(node.args[0])
            elif len(weight.all_input_nodes) > 0:  # of an operator that makes float32 of it
                values = weight.all_input_nodes[0]
                counts[roles[node.name], _dtype(values)] += values.meta["val"].numel()
    return tuple(Stored(*names, weights) for names, weights in counts.items())


def _width(node: Any) -> int:
    return int(node.meta["val"].shape[-1])


def _format(node: Any, weight: Any, parts: list[Any]) -> str:
    if not is_call(node, LINEAR_QUANTIZED, ours.expert_linear_quantized.default):
        return _dtype(weight)
    return _grouped(weight, parts)


def _grouped(weight: Any, parts: list[Any]) -> str:
    scales, offsets = (*parts, None)[:2]
    if _width(weight) != _width(scales) * GROUP_SIZE:
        return INT8.name
    return INT4.name if offsets is None else INT4_OFFSETS.name


def _dtype(weight: Any) -> str:
    return str(weight.meta["val"].dtype).removeprefix("torch.")
