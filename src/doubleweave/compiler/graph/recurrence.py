"""Find the recurrences of an exported graph: what lies between a state and its next value.

A recurrence becomes a piece of its own that runs row behind row. What has the size of a state joins it, as does what
only lays its inputs and results out anew, so that little passes its edge. This module knows nothing of models.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import (
    LAYOUT,
    NEXT,
    STATE,
    TOGETHER,
    expression,
    is_call,
    is_tensor,
    nodes_of,
    output_node,
)

aten = torch.ops.aten

_LAYOUT = LAYOUT | {
    *(aten._unsafe_view.default, aten.t.default, aten.squeeze.dims, aten.alias.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, operator.getitem),
}
RECURRENCE = "recurrence"


def name_states(graph_module: fx.GraphModule, names: Sequence[str]) -> None:
    """Mark the placeholders of the states, behind ids and positions (STATE), and give them names of their own."""
    graph = graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    for placeholder, name in zip(placeholders[2 : 2 + len(names)], names, strict=True):
        placeholder.target = placeholder.name = name
        placeholder.meta[STATE] = None
        # How many rows there are is asked of the token ids: nothing but its recurrence may read a state.
        for user in list(placeholder.users):
            if is_call(user, aten.sym_size.int):
                user.args = (placeholders[0], 1)


def mark_recurrences(graph_module: fx.GraphModule) -> None:
    """Mark each state's next value (STATE, NEXT) and the nodes of each recurrence (TOGETHER in their meta).

    States whose recurrences overlap are one recurrence.
    """
    graph = graph_module.graph
    states = [node for node in graph.nodes if STATE in node.meta]
    _drop_clones(graph)
    bodies: list[set[Any]] = []
    # A row of the stream between layers: what is no larger passes from segment to segment anyway.
    width = max((_row_elements(n) for n in graph.nodes if is_call(n, aten.embedding.default)), default=0)
    for placeholder, following in zip(states, output_node(graph).args[0][1:], strict=True):
        placeholder.meta[STATE], following.meta[NEXT] = following, True
        body = _body(placeholder, following, width)
        for other in [other for other in bodies if other & body]:
            bodies.remove(other)
            body = _convex(body | other)
        bodies.append(body)
    for number, body in enumerate(bodies):
        _with_own_layouts(graph, body)
        for node in body:
            node.meta[TOGETHER] = f"{RECURRENCE}/{number}"
    graph_module.recompile()


def _drop_clones(graph: fx.Graph) -> None:
    """Clones of a state are the state: nothing writes to it."""
    for node in nodes_of(graph):
        if is_call(node, aten.clone.default) and STATE in node.args[0].meta:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _row_elements(node: Any) -> int:
    """Elements of a tensor of one row; 0 for what is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    sizes = (expression(size) for size in value.shape)
    return math.prod(int(size.subs(dict.fromkeys(size.free_symbols, 1))) for size in sizes)


def _body(state: Any, following: Any, width: int) -> set[Any]:
    after, before = _reached([state], "users"), _reached([following], "all_input_nodes")
    body = {node for node in after & before if _is_tensor_call(node)} or {following}
    size = _row_elements(state)

    def is_large(node: Any) -> bool:
        is_result = size > width and is_tensor(node) and node.op == "call_function"
        return is_result and 2 * _row_elements(node) > size

    # A result that is as large as the state is read where it is made, and made where it is read.
    todo = list(body)
    while todo:
        node = todo.pop()
        near = [user for user in node.users if user.op == "call_function"] if is_large(node) else []
        near += [source for source in node.all_input_nodes if is_large(source) and source is not state]
        new = {found for found in near if found not in body and _is_tensor_call(found)}
        body |= new
        todo += new
    body |= {user for user in state.users if _is_tensor_call(user)}
    return _convex(body)


def _is_tensor_call(node: Any) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, (Tensor, tuple, list))


def _convex(body: set[Any]) -> set[Any]:
    """With all that lies between two nodes of the body."""
    between = _reached(body, "users") & _reached(body, "all_input_nodes")
    return body | {node for node in between if _is_tensor_call(node)}


def _reached(start: Any, edge: str) -> set[Any]:
    found, todo = set(start), list(start)
    while todo:
        for node in getattr(todo.pop(), edge):
            if node not in found:
                found.add(node)
                todo.append(node)
    return found


def _with_own_layouts(graph: fx.Graph, body: set[Any]) -> None:
    """Take what lays out the body's inputs and results into the body: inputs' as copies of its own."""
    copies: dict[Any, Any] = {}

    def own(node: Any) -> Any:
        if node in body or not is_call(node, *_LAYOUT):
            return node
        if node not in copies:
            with graph.inserting_before(node.next):
                copies[node] = graph.node_copy(node, own)
            copies[node].meta = dict(node.meta)
            new.append(copies[node])
        return copies[node]

    new: list[Any] = []
    for node in sorted(body, key=_places(graph).__getitem__):
        node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), own)
    body.update(new)
    todo = list(body)
    while todo:
        node = todo.pop()
        for user in node.users:
            tensors = [source for source in user.all_input_nodes if _is_tensor_call(source)]
            if (
                user not in body
                and is_call(user, *_LAYOUT)
                and _has_rows_first(user)
                and set(tensors) <= body
            ):
                body.add(user)
                todo.append(user)
    graph.eliminate_dead_code()
    body.intersection_update(graph.nodes)


def _has_rows_first(node: Any) -> bool:
    """Whether the node's tensors have one row in each place of their first axis."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(t, Tensor) and t.ndim and expression(t.shape[0]).is_Symbol for t in tensors)


def _places(graph: fx.Graph) -> dict[Any, int]:
    return {node: place for place, node in enumerate(graph.nodes)}
