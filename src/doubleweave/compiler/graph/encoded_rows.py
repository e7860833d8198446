"""Keys and values that a decoder takes from its encoder's rows: worked out once a sequence, not once a chunk.

What computes them is cut out of the exported graph; in its place stand inputs that every chunk reads. This module knows
nothing of segments or transformers.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from doubleweave.compiler.graph.nodes import ENCODED, is_tensor, nodes_of
from doubleweave.compiler.graph.ops import CROSS
from doubleweave.compiler.graph.refusal_causes import place_of_node
from doubleweave.errors import SplitError

ROWS = "encoder_rows"  # the placeholder


def cut_encoded(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Give each cross-attention its keys and values as inputs of the graph, in place; return what computes them.

    The module takes the encoder's rows, float32 [1, E, width], and gives [1, E, …] for each of the inputs, in their
    order. Raises SplitError where the decoder uses the rows otherwise.
    """
    graph = graph_module.graph
    rows = next(node for node in graph.find_nodes(op="placeholder") if str(node.target).startswith(ROWS))
    found: dict[Any, str] = {}
    crossing = [node for node in nodes_of(graph) if node.target is CROSS]
    for number, node in enumerate(crossing):
        for source, letter in zip(node.args[1:3], "kv", strict=True):
            found.setdefault(source, f"encoded_{letter}_{number}")
    projection = _copied(graph_module, rows, list(found))
    for source, name in found.items():
        with graph.inserting_before(rows):
            given = graph.placeholder(name)
        given.meta["val"] = source.meta["val"]
        given.meta[ENCODED] = True
        for node in crossing:
            node.args = tuple(given if arg is source else arg for arg in node.args)
    graph.eliminate_dead_code()
    if users := [user for user in rows.users if is_tensor(user)]:
        raise SplitError(
            f"{place_of_node(users[0])} reads the encoder's rows ({users[0].target}): expected a decoder that reads "
            "them in attention alone; this architecture is not supported"
        )
    if rows.users:
        raise SplitError(
            f"{place_of_node(next(iter(rows.users)))} counts the encoder's rows: expected a decoder that reads them "
            "in attention alone; this architecture is not supported"
        )
    graph.erase_node(rows)
    graph_module.recompile()
    return projection


def _copied(graph_module: fx.GraphModule, rows: fx.Node, results: list[Any]) -> fx.GraphModule:
    """A module of what `results` are computed by from `rows`."""
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {rows: graph.placeholder(ROWS)}
    copied[rows].meta["val"] = rows.meta["val"]

    def copy(node: fx.Node) -> Any:
        if node not in copied:
            if node.op == "placeholder":
                raise SplitError(
                    f"a cross-attention's keys follow from {node.target} too: expected keys and values that follow "
                    "from the encoder's rows alone; this architecture is not supported"
                )
            for source in node.all_input_nodes:
                copy(source)
            copied[node] = graph.node_copy(node, lambda n: copied[n])
        return copied[node]

    graph.output(tuple(copy(node) for node in results))
    return fx.GraphModule(graph_module, graph)
