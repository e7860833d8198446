"""Graph passes that bring an exported language model to the form that the split expects; its numbers stay equal.

In order, the passes drop checks and no-ops, concatenate what is written part by part, compute calls that depend on
weights alone, make linears of other products with weights, cut a product whose output is sliced into one product a
slice, move head transposes down until they cancel, make rotary embedding one operator, and join chains of views. A
decoder layer is then linears, norms and element-wise operators over [1, T, features]: K and V leave it as rows of the
cache, and appending them needs no copy.

Each pass changes a GraphModule in place. This module knows nothing of segments or backends.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.complex_numbers import without_complex
from doubleweave.compiler.graph.find_rotary import find_rotary
from doubleweave.compiler.graph.fresh_tensors import drop_whole_writes, without_empty
from doubleweave.compiler.graph.linears import as_linears
from doubleweave.compiler.graph.nodes import (
    constant,
    insert,
    is_call,
    is_tensor,
    nodes_of,
    replace_nodes,
    same_shape,
)
from doubleweave.compiler.graph.sliced_products import split_sliced_products
from doubleweave.sources.file_weights import transposed

aten = torch.ops.aten

_IDENTITY = {
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
}
_CAST = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default, aten._to_copy.default}
_VIEW = {
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
}
_ELEMENTWISE = {
    aten.pow.Tensor_Scalar,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.rsqrt.default,
    aten.neg.default,
}


def simplify(graph_module: fx.GraphModule) -> None:
    """Run every pass."""
    drop_no_ops(graph_module)
    without_complex(graph_module)
    without_empty(graph_module)
    drop_whole_writes(graph_module)
    fold_constants(graph_module)
    as_linears(graph_module)
    split_sliced_products(graph_module)
    # The patterns of the next two passes have no views in between; rotary leaves views and transposes to cancel again.
    cancel_views(graph_module)
    sink_transposes(graph_module)
    find_rotary(graph_module)
    cancel_views(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()


def drop_no_ops(graph_module: fx.GraphModule) -> None:
    """Drop checks of tensor metadata, casts to the same dtype, dropout in eval mode, products with 1.0 and the like."""
    graph = graph_module.graph
    for check in (
        *graph.find_nodes(op="call_module", target="_guards_fn"),
        *graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default),
    ):
        graph.erase_node(check)
    replace_nodes(graph, lambda node: node.args[0] if _is_no_op(node) else None)


def _is_no_op(node: Any) -> bool:
    if not (node.op == "call_function" and node.args and is_tensor(node) and is_tensor(node.args[0])):
        return False
    before: torch.Tensor = node.args[0].meta["val"]
    after: torch.Tensor = node.meta["val"]
    if node.target in _IDENTITY:
        return not (node.target is aten.dropout.default and node.args[2])
    if node.target in _CAST:
        return before.dtype == after.dtype and before.device == after.device
    if node.target in (aten.expand.default, aten.slice.Tensor):
        return same_shape(before, after)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return isinstance(node.args[1], float) and node.args[1] == 1.0 and before.dtype == after.dtype
    return False


def drop_whole_copies(graph_module: fx.GraphModule) -> None:
    """Drop copies to all of a tensor, and concatenations with nothing: a language model's values need no copies."""
    graph = graph_module.graph
    replace_nodes(graph, lambda node: node.args[1] if _is_whole_copy(node) else None)
    replace_nodes(graph, _only_part)


def _is_whole_copy(node: Any) -> bool:
    """Whether a write to a tensor, as `x[1:] += y` has, puts another of its shape and dtype in its place."""
    if not is_call(node, aten.copy.default):
        return False
    before, written = (source.meta["val"] for source in node.args[:2])
    return before.dtype == written.dtype and same_shape(before, written)


def _only_part(node: Any) -> Any:
    """What a concatenation with nothing joins: partial rotary embedding, where the part is the whole."""
    if not is_call(node, aten.cat.default):
        return None
    parts = [part for part in node.args[0] if "0" not in map(str, part.meta["val"].shape)]
    return parts[0] if len(parts) == 1 < len(node.args[0]) else None


def fold_constants(graph_module: fx.GraphModule) -> None:
    """Compute calls that depend on weights alone (Gemma's `1 + weight`), where the result is no larger than they."""

    def folded(node: Any) -> Any:
        # One of several results is computed with the call that it is of.
        call = node.args[0] if is_call(node, operator.getitem) else node
        inputs = call.all_input_nodes
        if node.op != "call_function" or not is_tensor(node) or not inputs:
            return None
        if any(n.op != "get_attr" for n in inputs):
            return None
        if node.meta["val"].numel() > max(n.meta["val"].numel() for n in inputs):
            return None
        args, kwargs = fx.map_arg((call.args, call.kwargs), lambda n: constant(graph_module, n))
        result = transposed(args[0]) if _is_transpose(call) else call.target(*args, **kwargs)
        name = f"_folded_{node.name}"
        graph_module.register_buffer(name, result if call is node else result[node.args[1]])
        weight = graph_module.graph.get_attr(name)
        weight.meta["val"] = node.meta["val"]
        return weight

    replace_nodes(graph_module.graph, folded)


def _is_transpose(node: Any) -> bool:
    """Of a matrix: a weight that stays in its file goes on to do so."""
    if is_call(node, aten.transpose.int):
        return node.meta["val"].ndim == 2 and {d % 2 for d in node.args[1:]} == {0, 1}
    return is_call(node, aten.t.default, aten.numpy_T.default) and node.meta["val"].ndim == 2


def _is_head_transpose(node: Any) -> bool:
    """[B, T, H, D] <-> [B, H, T, D]."""
    return (
        is_call(node, aten.transpose.int)
        and {d % 4 for d in node.args[1:3]} == {1, 2}
        and len(node.meta["val"].shape) == 4
    )


def sink_transposes(graph_module: fx.GraphModule) -> None:
    """Move head transposes below norms and element-wise operators (Gemma 3 norms q after its transpose)."""
    graph = graph_module.graph

    def moved(node: Any) -> Any:
        if not _moves_below_transpose(node):
            return None
        args = [arg.args[0] if _is_head_transpose(arg) else arg for arg in node.args]
        inner = insert(graph, node.target, *args, like=node)
        return insert(graph, aten.transpose.int, inner, 1, 2, like=node)

    replace_nodes(graph, moved)


def _moves_below_transpose(node: Any) -> bool:
    if node.op != "call_function" or node.kwargs:
        return False
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if node.target is aten.mean.dim:
        return list(node.args[1]) in ([-1], [3]) and bool(node.args[2]) and _is_head_transpose(tensors[0])
    if node.target not in _ELEMENTWISE or not any(_is_head_transpose(arg) for arg in tensors):
        return False
    return all(
        _is_head_transpose(arg) or (is_tensor(arg) and len(arg.meta["val"].shape) <= 1) for arg in tensors
    )


def cancel_views(graph_module: fx.GraphModule) -> None:
    """Join chains of views, cancel transposes that undo one another, drop views that change nothing."""
    graph = graph_module.graph
    changed = True
    while changed:
        changed = False
        for node in nodes_of(graph):
            source: Any = node.args[0] if node.args else None
            if is_call(node, aten.transpose.int) and is_call(source, aten.transpose.int):
                rank = len(node.meta["val"].shape)
                if {d % rank for d in node.args[1:3]} == {d % rank for d in source.args[1:3]}:
                    node.replace_all_uses_with(source.args[0])
                    changed = True
            elif is_call(node, *_VIEW) and isinstance(source, fx.Node):
                if same_shape(node.meta["val"], source.meta["val"]):
                    node.replace_all_uses_with(source)
                    changed = True
                elif is_call(node, aten.view.default, aten.reshape.default) and is_call(source, *_VIEW):
                    node.args = (source.args[0], *node.args[1:])
                    changed = True
        changed = bool(graph.eliminate_dead_code()) or changed
