"""Tensors that a model makes empty and fills part by part, as one concatenation, or as zeros.

ExecuTorch plans `empty` of a size that varies for the size of the example, and everything that follows from it. This
module knows nothing of models or segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of, replace_nodes, same_shape

aten = torch.ops.aten

_EMPTY = (
    aten.empty.memory_format,
    aten.empty_permuted.default,
    aten.new_empty.default,
    aten.empty_like.default,
)


class _Part(NamedTuple):
    first: int
    end: int
    source: Any  # node


def changes_in_place(graph: fx.Graph) -> bool:
    """Whether an operator of the graph writes to a tensor that it was given."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in graph.nodes
    )


def without_empty(graph_module: fx.GraphModule) -> None:
    """Replace what is written to all parts of an empty tensor by their concatenation, other empty tensors by zeros.

    The graph changes nothing in place: a write to a part is a `slice_scatter`.
    """
    graph = graph_module.graph
    if not any(is_call(node, *_EMPTY) for node in graph.nodes):
        return
    # From the last write on: it concatenates all parts, and the writes before it are dead.
    for node in reversed(nodes_of(graph)):
        found = _parts(node)
        if found is None:
            continue
        parts, dim = found
        with graph.inserting_before(node):
            sources = [_source(graph, part.source, node) for part in parts]
            whole = insert(graph, aten.cat.default, sources, dim, like=node)
        node.replace_all_uses_with(whole)
    graph.eliminate_dead_code()
    replace_nodes(graph, lambda node: _zeros(graph, node))
    graph_module.recompile()


def drop_whole_writes(graph_module: fx.GraphModule) -> None:
    """What is written to all of a tensor is the tensor: the step of an axis that has one place (Kimi's output)."""

    def written(node: Any) -> Any:
        if not is_call(node, aten.select_scatter.default):
            return None
        target, source, axis = node.args[:3]
        whole: torch.Tensor = target.meta["val"]
        if whole.shape[axis] != 1 or whole.dtype != source.meta["val"].dtype:
            return None
        return insert(graph_module.graph, aten.unsqueeze.default, source, axis, like=node)

    replace_nodes(graph_module.graph, written)
    replace_nodes(graph_module.graph, lambda node: _chosen(graph_module.graph, node))


def _chosen(graph: fx.Graph, node: Any) -> Any:
    """What is written where a mask of the same shape says so is a choice between two numbers."""
    if not is_call(node, aten.index_put.default) or (len(node.args) > 3 and node.args[3]):
        return None
    target, (mask, *others), value = node.args[:3]
    is_one = value.meta["val"].numel() == 1 and value.meta["val"].dtype == target.meta["val"].dtype
    if others or mask.meta["val"].dtype != torch.bool or not is_one:
        return None
    if not same_shape(mask.meta["val"], target.meta["val"]):
        return None
    return insert(graph, aten.where.self, mask, value, target, like=node)


def _parts(node: Any) -> tuple[list[_Part], int] | None:
    """The parts of a tensor that was empty and then written to along one axis, in order, and the axis."""
    parts: list[_Part] = []
    axis: int | None = None
    value = node
    while is_call(value, aten.slice_scatter.default):
        given: tuple[Any, ...] = value.args
        base, source, dim, start, end, step = given + (0, None, None, 1)[len(given) - 2 :]
        width = base.meta["val"].shape[dim]
        dim %= base.meta["val"].ndim
        if not isinstance(width, int) or axis not in (None, dim) or step != 1:
            return None
        if not all(isinstance(edge, int | None) for edge in (start, end)):
            return None
        first, last, _ = slice(start, end).indices(width)
        if any(first < part.end and part.first < last for part in parts):
            return None  # written twice
        parts.append(_Part(first, last, source))
        axis, value = dim, base
    if axis is None or not is_call(value, *_EMPTY):
        return None
    parts.sort(key=lambda part: part.first)
    return (parts, axis) if _meet(parts, int(value.meta["val"].shape[axis])) else None


def _meet(parts: Sequence[_Part], width: int) -> bool:
    edges = [0, *(edge for part in parts for edge in part[:2]), width]
    return all(a == b for a, b in zip(edges[::2], edges[1::2], strict=True))


def _source(graph: fx.Graph, source: Any, like: Any) -> Any:
    """What is copied to a part, where `source` is a copy to it: expanded to its shape and cast as the copy does."""
    if not is_call(source, aten.copy.default):
        return source
    target, value = source.args[:2]
    wanted: torch.Tensor = target.meta["val"]
    given: torch.Tensor = value.meta["val"]
    if given.dtype != wanted.dtype:
        value = insert(graph, aten.to.dtype, value, wanted.dtype, like=like)
    if same_shape(given, wanted):
        return value
    sizes = [
        size if isinstance(size, int) else insert(graph, aten.sym_size.int, target, axis, like=like)
        for axis, size in enumerate(wanted.shape)
    ]
    return insert(graph, aten.expand.default, value, sizes, like=like)


def _zeros(graph: fx.Graph, node: Any) -> Any:
    if not is_call(node, *_EMPTY):
        return None
    value: torch.Tensor = node.meta["val"]
    kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    if node.target is aten.empty_like.default:
        zeros = graph.call_function(aten.full_like.default, (node.args[0], 0), kind)
    else:
        sizes = node.args[1] if node.target is aten.new_empty.default else node.args[0]
        zeros = graph.call_function(aten.full.default, (sizes, 0), kind)
    zeros.meta.update({key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta})
    return zeros
