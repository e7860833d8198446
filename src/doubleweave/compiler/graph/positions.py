"""Positions of tokens: which a model counts from, where its graph counts them, and what follows from them alone."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import (
    LAYOUT,
    expression,
    insert,
    is_call,
    is_tensor,
    nodes_of,
    replace_nodes,
)
from doubleweave.errors import SplitError
from doubleweave.sources.first_layers import enough_layers, first_layers

aten = torch.ops.aten

POSITIONS = "position_ids"  # the placeholder, int64 [1, T]
# What moves numbers, or joins them, and computes nothing.
MOVES = LAYOUT | {
    *(aten.cat.default, aten.stack.default, aten.neg.default, aten.repeat_interleave.self_int),
}
_TOKENS = 3


def placeholder_of(graph: fx.Graph) -> Any:
    """The positions, int64 [1, T]."""
    return next(node for node in graph.find_nodes(op="placeholder") if node.target == POSITIONS)


def positions_meant(given: Tensor) -> Tensor:
    """The positions, int64 [1, T], that are given as they are or as ~p, which LongRoPE's long frequencies are asked for
    by (rotary_lengths.py)."""
    return torch.where(given < 0, ~given, given)


def are_split(graph: fx.Graph) -> bool:
    """Whether the graph takes positions both ways."""
    return any(is_call(user, aten.lt.Scalar) for user in placeholder_of(graph).users)


def num_rows(graph: fx.Graph) -> Any:
    """How many rows there are, T, as an expression."""
    return expression(placeholder_of(graph).meta["val"].shape[1])


def check_first(model: Any, first: int) -> None:
    """Raises SplitError where the model, given no positions, does not count them from `first`."""
    if POSITIONS not in inspect.signature(model.forward).parameters:
        return
    ids = torch.ones(1, _TOKENS, dtype=torch.long)
    if getattr(model.config.get_text_config(decoder=True), "pad_token_id", None) == 1:
        ids += 1  # RoBERTa counts no padding
    positions = torch.arange(first, first + _TOKENS)[None]
    # The layers only read what a model makes of positions before them: a few are enough.
    count = enough_layers(model)
    with torch.no_grad(), first_layers(model, count) if count else nullcontext():
        own = model(input_ids=ids, use_cache=False).logits
        given = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    if not torch.allclose(own, given, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
        raise SplitError(
            f"{type(model).__name__}: given no position_ids it gives other logits than for the positions from {first} "
            "on: expected a decoder whose tokens are at consecutive positions; this architecture is not supported"
        )


def from_positions(graph: fx.Graph) -> set[fx.Node]:
    """The calls whose results follow from the positions, and weights, alone."""
    found: set[fx.Node] = set()
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.target == POSITIONS:
            found.add(node)
        elif node.op == "get_attr" or (
            node.op == "call_function" and constants.issuperset(node.all_input_nodes)
        ):
            constants.add(node)
        elif node.op == "call_function" and all(n in found or n in constants for n in node.all_input_nodes):
            found.add(node)
    return {node for node in found if node.op == "call_function"}


def moved_tables(graph: fx.Graph) -> set[fx.Node]:
    """The calls of `from_positions` that move float numbers: each layer unsqueezes the tables that all share."""
    return {
        node
        for node in from_positions(graph)
        if node.target in MOVES and all(source.meta["val"].is_floating_point() for source in _tensors(node))
    }


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if is_tensor(source)]


def share_computed(graph_module: fx.GraphModule) -> None:
    """Compute once what layers compute alike from the positions, such as the scale of queries."""
    graph = graph_module.graph
    found = from_positions(graph) - moved_tables(graph)
    first: dict[str, Any] = {}
    for node in nodes_of(graph):
        if node in found and not node.kwargs:
            same = first.setdefault(f"{node.target} {node.args}", node)
            if same is not node:
                node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def count_by_positions(graph_module: fx.GraphModule) -> None:
    """Positions in the place of an arange over the rows, with which a model counts them (Bart).

    Without a cache the row at i of the arange is that of the token at i, whatever the model makes of it; so in every
    chunk it has to be what it is in the whole prompt.
    """
    graph = graph_module.graph
    positions, rows = placeholder_of(graph), num_rows(graph)

    def counted(node: Any) -> Any:
        if not is_call(node, aten.arange.default, aten.arange.start, aten.arange.start_step):
            return None
        start = 0 if node.target is aten.arange.default else node.args[0]
        step = node.args[2] if len(node.args) > 2 else 1
        if not isinstance(start, int) or step != 1 or expression(node.meta["val"].shape[0]) != rows:
            return None
        found = insert(graph, aten.select.int, positions, 0, 0, like=node)
        if start:
            found = insert(graph, aten.add.Tensor, found, start, like=node)
        dtype = node.meta["val"].dtype
        return insert(graph, aten.to.dtype, found, dtype, like=node) if dtype != torch.int64 else found

    replace_nodes(graph, counted)
    graph_module.recompile()
