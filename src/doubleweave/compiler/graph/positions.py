"""What a language model's graph computes from the tokens' positions: angles, masks, scales."""

from __future__ import annotations

from torch import fx

POSITIONS = "position_ids"  # the placeholder, int64 [1, T]


def from_positions(graph: fx.Graph) -> set[fx.Node]:
    """The calls whose results follow from the positions, and weights, alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == POSITIONS:
            found.add(node)
        elif node.op == "call_function":
            inputs = [source for source in node.all_input_nodes if source.op != "get_attr"]
            if inputs and all(source in found for source in inputs):
                found.add(node)
    return {node for node in found if node.op == "call_function"}
