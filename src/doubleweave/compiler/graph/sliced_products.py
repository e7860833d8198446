"""Cut a product with weights whose features are sliced into one product a slice."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.nodes import constant, insert, is_call, nodes_of
from doubleweave.sources.file_weights import sliced

aten = torch.ops.aten

# How many arguments stand before weight and bias; these have the product's features at the same axis, this one.
_PRODUCTS = {aten.linear.default: (1, 0), torch.ops.doubleweave.expert_linear.default: (2, 1)}


def split_sliced_products(graph_module: fx.GraphModule) -> None:
    """linear or expert_linear, then slices or a split of its features (qkv_proj, gate and up) -> one product a slice.

    K and V would otherwise be columns of a wider tensor, and appending them to the cache would need a copy; and
    XNNPACK's delegates take no slices of tensors with dynamic rows.
    """
    graph = graph_module.graph
    for node in nodes_of(graph):
        if not is_call(node, *_PRODUCTS):
            continue
        num_given, axis = _PRODUCTS[node.target]
        given, weights = node.args[:num_given], node.args[num_given:]
        pieces = [piece for user in node.users if (piece := _cut(user)) is not None]
        is_constant = all(source is None or source.op == "get_attr" for source in weights)
        if not pieces or len(pieces) < len(node.users) or not is_constant:
            continue
        for replaced, features in itertools.chain(*pieces):
            places = (*[slice(None)] * axis, features)
            with graph.inserting_before(node):
                cut = [
                    None
                    if source is None
                    else _part(graph_module, source, places, f"_{replaced.name}_{kind}")
                    for source, kind in zip(weights, ("weight", "bias"), strict=False)
                ]
                product = insert(graph, node.target, *given, *cut, like=node)
            replaced.replace_all_uses_with(product)
        graph.eliminate_dead_code()


def _part(graph_module: fx.GraphModule, source: Any, places: tuple[slice, ...], name: str) -> Any:
    graph_module.register_buffer(name, sliced(constant(graph_module, source), places))
    node = graph_module.graph.get_attr(name)
    node.meta["val"] = source.meta["val"][places]
    return node


def _cut(user: Any) -> list[tuple[Any, slice]] | None:
    """(node to replace, its features) of each part, None where `user` cuts no features."""
    if is_call(user, aten.slice.Tensor):
        given: tuple[Any, ...] = user.args[1:]
        axis, start, end, step = given + (0, None, None, 1)[len(given) :]
        return [(user, slice(start, end, step))] if axis in (-1, user.meta["val"].ndim - 1) else None
    if is_call(user, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        parts = user.meta["val"]
        axis = user.args[2] if len(user.args) > 2 else 0
        if axis not in (-1, parts[0].ndim - 1) or not all(is_call(n, operator.getitem) for n in user.users):
            return None
        edges = list(itertools.accumulate((int(part.shape[-1]) for part in parts), initial=0))
        return [(item, slice(*edges[item.args[1] :][:2])) for item in user.users]
    return None
