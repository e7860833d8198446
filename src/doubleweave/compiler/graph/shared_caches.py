"""Keys and values that layers share (Gemma 3n, Gemma 4) as one tensor of the graph: one cache with several readers.

Each attention takes its rows by views of its own; those of one tensor in one shape are the same rows.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from doubleweave.compiler.graph.nodes import is_call, is_tensor
from doubleweave.compiler.graph.ops import ATTENTIONS
from doubleweave.compiler.graph.positions import MOVES


def share_caches(graph_module: fx.GraphModule) -> None:
    """Let every attention read the first of equal views as its keys or values."""
    graph = graph_module.graph
    first: dict[Any, Any] = {}
    for node in [node for node in graph.nodes if node.target in ATTENTIONS]:
        q, *rows = node.args[:3]
        node.args = (q, *(first.setdefault(_form(found), found) for found in rows), *node.args[3:])
    graph.eliminate_dead_code()
    graph_module.recompile()


def _form(node: Any) -> Any:
    """Equal for nodes that hold the same numbers in the same shape: the tensor behind, and what moves it."""
    tensors = [source for source in node.all_input_nodes if is_tensor(source)]
    if not is_call(node, *MOVES) or len(tensors) != 1:
        return node
    numbers = tuple(str(arg.meta["val"] if isinstance(arg, fx.Node) else arg) for arg in _flat(node.args[1:]))
    return node.target, _form(tensors[0]), numbers, str(node.meta["val"].shape)


def _flat(args: Any) -> list[Any]:
    return [part for arg in args for part in (_flat(arg) if isinstance(arg, (list, tuple)) else [arg])]
