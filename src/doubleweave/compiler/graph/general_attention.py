"""Attention that the attention operator does not have, kept in the model's own operators.

A graph is exported with as many keys as queries. Here the part in which they meet becomes an operator over a graph of
its own, whose queries are the rows of a chunk and whose keys are all rows so far (general_part.py). The part is tried
with random numbers before it takes the place of the model's operators. This module knows nothing of segments or
transformers.

Shape legend: T queries, the newest rows; S keys, all rows so far.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import fx

from doubleweave.compiler.graph.edges import Edges
from doubleweave.compiler.graph.general_part import KEY, QUERY, Part
from doubleweave.compiler.graph.general_rules import rule_of
from doubleweave.compiler.graph.nodes import insert
from doubleweave.compiler.graph.ops import GENERAL
from doubleweave.compiler.graph.position_bias import Positions

GRAPH = "graph"  # in the operator's meta: the graph of queries, keys and weights that it stands for


def general_attention(graph_module: fx.GraphModule, node: Any, positions: Positions) -> None:
    """Put the general operator in the place of `node`, [1, T, …] or another form of rows, which attention results in.

    Raises NotUnderstood where the part cannot be told apart into queries and keys, or is no function of a row's own
    queries and of the keys up to it.
    """
    graph = graph_module.graph
    edges = Edges(positions.symbol)
    part = Part(graph_module, positions, edges, rule_of)
    part.finish(node)
    part.check(node)
    queries, keys = (
        [_outside(graph, edges, leaf, node) for leaf in part.leaves[kind]] for kind in (QUERY, KEY)
    )
    with graph.inserting_before(node):
        width = int(edges.shape(node)[2])
        result = insert(graph, GENERAL, queries, keys, part.weights, width, like=node)
        result.meta[GRAPH] = part.graph
        inside = edges.inside(graph, result, node)
    node.replace_all_uses_with(inside)
    graph.erase_node(node)


def inline_general(graph: fx.Graph) -> None:
    """Put the graphs of general operators in their place."""
    found = graph.find_nodes(op="call_function", target=GENERAL)
    for node in found:
        inner: fx.Graph = node.meta[GRAPH]
        given = dict(zip(inner.find_nodes(op="placeholder"), [*chain(*node.args[:3])], strict=True))
        with graph.inserting_before(node):
            result = graph.graph_copy(inner, given)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    # Names that follow from this graph alone: those of equal graphs are equal.
    for number, node in enumerate(graph.nodes if found else ()):
        if node.op == "call_function":
            node.name = f"n{number}"


def _outside(graph: fx.Graph, edges: Edges, leaf: Any, before: Any) -> Any:
    with graph.inserting_before(before):
        return edges.outside(graph, leaf, leaf)
