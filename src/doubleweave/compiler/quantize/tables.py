"""Quantize the tables of a split that are only looked up (embeddings): int8 rows, one scale each, or as asked for.

A table that is a quantized linear's weights too is left to weights.py: it takes no room of its own in a program. Knows
nothing of models or backends.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of
from doubleweave.compiler.graph.table_ops import TABLE_ROWS
from doubleweave.compiler.policy import DEFAULT_BACKEND
from doubleweave.compiler.quantize.formats import TABLES, Format
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.quantize.weights import quantized_parts, renumbered
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.transform import copy_graph, transform_segments
from doubleweave.compiler.split.weights import Convert

aten = torch.ops.aten


def quantize_tables(torch_split: TorchSplit, into: str = "int8") -> TorchSplit:
    """Quantize every table that nothing but lookups reads, where they are computed by the CPU's own operators.

    `into` is a name of TABLES; rows of int4 are in whole groups, so tables of other widths are int8.
    """
    segments = (segment for segment in torch_split.split.segments if segment.backend == DEFAULT_BACKEND)
    names = frozenset(s.name for s in segments if tables(torch_split.graphs[s.structure].graph))
    return transform_segments(torch_split, partial(_quantize_graph, TABLES[into]), names)


def tables(graph: fx.Graph) -> set[Any]:
    """The weights that nothing but lookups reads, by name; of a quantized table its rows and their scales."""
    looked_up: set[Any] = set()
    else_read: set[Any] = set()
    for node in nodes_of(graph):
        taken: tuple[Any, ...] = ()
        others: tuple[Any, ...] = ()
        if is_call(node, aten.embedding.default):
            taken, others = node.args[:1], node.args[1:]
        elif is_call(node, TABLE_ROWS):
            taken, others = (*node.args[:2], *node.args[3:]), node.args[2:3]
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                is_lookup = source in taken and source not in others
                (looked_up if is_lookup else else_read).add(source.target)
    return looked_up - else_read


def _quantize_graph(wanted: Format, graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    graph = copy_graph(graph_module)
    found = tables(graph)
    quantized: dict[int, Format] = {}
    for node in nodes_of(graph):
        if not is_call(node, aten.embedding.default) or node.args[0].target not in found:
            continue
        table, index = node.args[:2]
        width = int(table.meta["val"].shape[1])
        into = TABLES["int8"] if wanted is TABLES["int4"] and width % GROUP_SIZE else wanted
        quantized[int(table.target[1:])] = into
        with graph.inserting_before(node):
            parts = quantized_parts(graph, table, into)
            values, scales, *offsets = (*parts, None, None, None)[:4]
            rows = insert(graph, TABLE_ROWS, values, scales, index, *offsets, like=node)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
    return renumbered(graph, quantized)
