"""Complex numbers as two real ones each, which is all that backends know: Llama 4 turns by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import LAYOUT, constant, insert, is_call, is_tensor, nodes_of
from doubleweave.errors import SplitError

aten = torch.ops.aten

_FOR_EACH = LAYOUT | {aten.alias.default, aten.detach.default}  # what moves numbers does the same to both


class _Pair(NamedTuple):
    real: Any  # nodes
    imaginary: Any


def without_complex(graph_module: fx.GraphModule) -> None:
    """Compute with the real and the imaginary part of each complex number; raises SplitError for another operator."""
    graph = graph_module.graph
    pairs: dict[Any, _Pair] = {}
    for node in nodes_of(graph):
        if not any(_is_complex(found) for found in (node, *node.all_input_nodes)):
            continue
        with graph.inserting_before(node):
            if node.target is aten.view_as_real.default:
                whole = insert(graph, aten.stack.default, list(pairs[node.args[0]]), -1, like=node)
                node.replace_all_uses_with(whole)
            elif (pair := _pair(graph_module, node, pairs)) is not None:
                pairs[node] = pair
            else:
                raise SplitError(
                    f"{node.target} of complex numbers: expected products and moves of them alone (compiler/graph/"
                    "complex_numbers.py); this architecture is not supported"
                )
    graph.eliminate_dead_code()


def _is_complex(node: Any) -> bool:
    return is_tensor(node) and node.meta["val"].is_complex()


def _pair(graph_module: fx.GraphModule, node: Any, pairs: dict[Any, _Pair]) -> _Pair | None:
    graph = graph_module.graph

    def add(target: Any, *args: Any) -> Any:
        return insert(graph, target, *args, like=node)

    if node.op == "get_attr":
        return _Pair(*(_part(graph_module, node, name) for name in ("real", "imag")))
    if is_call(node, aten.polar.default):
        length, angle = node.args
        turned = add(aten.cos.default, angle), add(aten.sin.default, angle)
        if is_call(length, aten.ones_like.default):
            return _Pair(*turned)
        return _Pair(*(add(aten.mul.Tensor, length, part) for part in turned))
    if is_call(node, aten.view_as_complex.default):
        return _Pair(*(add(aten.select.int, node.args[0], -1, part) for part in (0, 1)))
    if is_call(node, *_FOR_EACH):
        return _Pair(*(add(node.target, part, *node.args[1:]) for part in pairs[node.args[0]]))
    if is_call(node, aten.mul.Tensor):
        return _product(add, *(pairs.get(arg, arg) for arg in node.args))
    return None


def _part(graph_module: fx.GraphModule, node: Any, name: str) -> Any:
    tensor = getattr(constant(graph_module, node), name).clone()
    graph_module.register_buffer(f"_{node.name}_{name}", tensor)
    part = graph_module.graph.get_attr(f"_{node.name}_{name}")
    part.meta["val"] = getattr(node.meta["val"], name).clone()
    return part


def _product(add: Any, a: Any, b: Any) -> _Pair:
    if not isinstance(a, _Pair):
        a, b = b, a
    if not isinstance(b, _Pair):
        return _Pair(*(add(aten.mul.Tensor, part, b) for part in a))
    (real, imaginary), mul = a, aten.mul.Tensor
    return _Pair(
        add(aten.sub.Tensor, add(mul, real, b.real), add(mul, imaginary, b.imaginary)),
        add(aten.add.Tensor, add(mul, real, b.imaginary), add(mul, imaginary, b.real)),
    )
