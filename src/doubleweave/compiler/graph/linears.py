"""Make linears of other products with weights: `x @ w`, and the addmm of modules that keep weights transposed (GPT-2).

Whatever quantizes, scales, packs or cuts weights looks at linears alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import constant, insert, is_call, nodes_of
from doubleweave.sources.file_weights import transposed

aten = torch.ops.aten


def as_linears(graph_module: fx.GraphModule) -> None:
    """matmul, mm or addmm with a weight [K, N] -> linear with [N, K]; without the views that give it two axes."""
    graph = graph_module.graph
    for node in nodes_of(graph):
        if (operands := _operands(node)) is None:
            continue
        x, weight, *bias = operands
        replaced = node
        if outer := _unflattened(node, x):
            replaced, x = outer, x.args[0]
        with graph.inserting_before(replaced):
            graph_module.register_buffer(
                name := f"_{node.name}_transposed", transposed(constant(graph_module, weight))
            )
            turned = graph.get_attr(name)
            turned.meta["val"] = weight.meta["val"].t()
            linear = insert(graph, aten.linear.default, x, turned, *bias, like=node)
        replaced.replace_all_uses_with(linear)
    graph.eliminate_dead_code()


def _operands(node: Any) -> tuple[Any, ...] | None:
    """What is multiplied, the weight, and a bias where there is one."""
    if is_call(node, aten.matmul.default, aten.mm.default):
        x, weight = node.args
        return (x, weight) if _is_weight(weight) and x.op != "get_attr" and x.meta["val"].ndim > 1 else None
    if is_call(node, aten.addmm.default) and not node.kwargs:
        bias, x, weight = node.args
        is_bias = bias.op == "get_attr" and bias.meta["val"].ndim == 1 and len(bias.meta["val"]) > 1
        return (x, weight, bias) if is_bias and _is_weight(weight) else None
    return None


def _is_weight(node: Any) -> bool:
    return bool(
        node.op == "get_attr" and node.meta["val"].ndim == 2 and node.meta["val"].dtype == torch.float32
    )


def _unflattened(node: Any, x: Any) -> Any:
    """The view of a product that gives it back the axes that a view of `x` had taken; None for anything else."""
    users = list(node.users)
    views = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
    if len(users) != 1 or not is_call(users[0], *views) or not is_call(x, *views):
        return None
    before, after = x.args[0].meta["val"].shape, users[0].meta["val"].shape
    is_last = x.meta["val"].shape[-1] == before[-1] and after[-1] == node.meta["val"].shape[-1]
    return users[0] if is_last and list(map(str, before[:-1])) == list(map(str, after[:-1])) else None
