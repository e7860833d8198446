"""Put what depends on positions alone, such as rotary tables, into the order in which it is used.

transformers makes a table for each kind of layer in a loop over a set, so the order of the tables in the graph is that
of a set of strings, another one in each process. Knows nothing of segments.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

_TOKENS = "input_ids"


def order_by_use(graph: fx.Graph) -> None:
    """Move the nodes that no token changes to the beginning, each behind its inputs, in the order of their users."""
    follow: set[fx.Node] = set()  # the nodes that tokens change
    for node in graph.nodes:
        reads_tokens = any(
            source.op == "placeholder" and source.target == _TOKENS for source in node.all_input_nodes
        )
        is_size = not hasattr(node.meta.get("val"), "shape")
        if (
            (reads_tokens and not is_size)
            or not follow.isdisjoint(node.all_input_nodes)
            or node.op == "output"
        ):
            follow.add(node)
    placed: set[fx.Node] = {node for node in graph.nodes if node.op == "placeholder"} | follow
    at = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    for user in [node for node in graph.nodes if node in follow]:
        for node in _with_inputs(user, placed):
            if node is not user:
                at.append(node)
                at = node


def _with_inputs(user: fx.Node, placed: set[fx.Node]) -> Iterator[fx.Node]:
    """What `user` reads, directly or not, and is not yet placed, inputs first; then `user`."""
    todo = [(user, iter(user.all_input_nodes))]
    while todo:
        node, sources = todo[-1]
        source = next((found for found in sources if found not in placed), None)
        if source is None:
            todo.pop()
            yield node
        else:
            placed.add(source)
            todo.append((source, iter(source.all_input_nodes)))
