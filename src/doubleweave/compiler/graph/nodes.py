"""Nodes of fx graphs: questions that passes ask about them, and marks that passes leave in their meta.

It knows nothing of models, segments or backends.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

aten = torch.ops.aten

# In a node's meta:
IN_ORDER = "in_order"  # the node runs after earlier nodes with this mark: they share a state
TOGETHER = "together"  # the piece that this node and others of the mark become; it is their owner
STATE = "state"  # of a placeholder, one for each row: the node that computes its next value
NEXT = "next"  # of that node: it is a state's next value
ENCODED = "encoded"  # of a placeholder: keys or values that the encoder gave, the same for every chunk
PAST = "past"  # of a placeholder: the node whose rows of earlier chunks it stands for, and to whose piece it belongs


# Operators that give the numbers of one tensor other axes, in the order that they have.
RESHAPES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default, aten.contiguous.default),
    }
)
# Operators that lay the numbers of one tensor out anew and compute nothing.
LAYOUT = RESHAPES | {
    *(aten.expand.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.select.int)
}


def nodes_of(graph: fx.Graph) -> list[Any]:
    """The nodes, untyped: their arguments are a union of everything a graph can hold."""
    return list(graph.nodes)


def constant(graph_module: fx.GraphModule, node: Any) -> Tensor:
    """The tensor behind a get_attr node."""
    tensor = operator.attrgetter(str(node.target))(graph_module)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def insert(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: Any) -> Any:
    """Insert a call at the graph's insertion point, with its fake value and `like`'s place in the module."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
    return node


def replace_nodes(graph: fx.Graph, replacement: Callable[[Any], Any]) -> None:
    """Replace each node by the one that `replacement` inserts or names for it (None: keep it), then drop dead code."""
    for node in nodes_of(graph):
        with graph.inserting_before(node):
            new = replacement(node)
        if new is not None:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def expression(size: Any) -> Any:
    """A size of a fake tensor, an int or a SymInt, as a sympy expression."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether the sizes are equal by their texts: comparing symbolic ones with == would add a guard to the export."""
    return list(map(str, a.shape)) == list(map(str, b.shape))


def output_node(graph: fx.Graph) -> Any:
    """The node whose arguments are the graph's results, untyped as in `nodes_of`."""
    return next(node for node in reversed(graph.nodes) if node.op == "output")
