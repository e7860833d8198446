"""Mixtures of experts as operators of ours, in a form that needs no slices of features.

transformers' experts modules ask `ExpertsInterface` for the function that computes them; ours calls `expert_linear` for
each of the two products and leaves the gate in between to the module. The router stays the model's own operators. This
module knows nothing of segments, quantization or backends.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.nodes import constant, insert, is_call, nodes_of
from doubleweave.errors import SplitError

aten = torch.ops.aten
_IMPLEMENTATION = "doubleweave"


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts function: rows [T, K], experts [T, C] and their scores [T, C] -> [T, K]."""
    if module._is_expert_parallel:
        raise SplitError(
            f"{type(module).__name__}'s experts are spread over devices: expected all of them here"
        )

    def product(x: Tensor, name: str) -> Tensor:
        weight = getattr(module, name)
        weight = weight.transpose(1, 2) if module.is_transposed else weight
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        found: Tensor = torch.ops.doubleweave.expert_linear(x, top_k_index, weight, bias)
        return found

    if module.has_gate:
        inner = module._apply_gate(product(hidden_states, "gate_up_proj"))
    else:
        inner = module.act_fn(product(hidden_states, "up_proj"))
    out = product(inner, "down_proj")
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    total: Tensor = torch.ops.doubleweave.expert_sum(out, top_k_weights)
    return total


@contextmanager
def experts_as_operators(model: Any) -> Iterator[None]:
    """Within this context the experts modules of `model` call our operators."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(_IMPLEMENTATION, _experts)
    # `set_experts_implementation` takes transformers' own names alone, so the configs that the modules ask are set.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "_is_expert_parallel")}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = _IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]


def split_sliced_experts(graph_module: fx.GraphModule) -> None:
    """expert_linear, then slices of its features (gate and up) -> one expert_linear a slice.

    XNNPACK's delegates take no slices of tensors with dynamic rows.
    """
    graph = graph_module.graph
    for node in nodes_of(graph):
        if not is_call(node, torch.ops.doubleweave.expert_linear.default):
            continue
        pieces = [piece for user in node.users if (piece := _cut(user)) is not None]
        is_constant = all(source is None or source.op == "get_attr" for source in node.args[2:])
        if not pieces or len(pieces) < len(node.users) or not is_constant:
            continue
        for replaced, features in itertools.chain(*pieces):
            with graph.inserting_before(node):
                constants = [
                    None
                    if source is None
                    else _features_of(graph_module, source, features, replaced.name, kind)
                    for source, kind in zip((*node.args[2:], None)[:2], ("weight", "bias"), strict=True)
                ]
                linear = insert(graph, node.target, *node.args[:2], *constants, like=node)
            replaced.replace_all_uses_with(linear)
        graph.eliminate_dead_code()


def _features_of(graph_module: fx.GraphModule, source: Any, features: slice, stem: str, kind: str) -> Any:
    name = f"_{stem}_{kind}"
    graph_module.register_buffer(name, constant(graph_module, source)[:, features].clone())
    node = graph_module.graph.get_attr(name)
    node.meta["val"] = source.meta["val"][:, features]
    return node


def _cut(user: Any) -> list[tuple[Any, slice]] | None:
    """(node to replace, its features) of each part, None where `user` cuts no features."""
    if is_call(user, aten.slice.Tensor):
        given: tuple[Any, ...] = user.args[1:]
        axis, start, end, step = given + (0, None, None, 1)[len(given) :]
        return [(user, slice(start, end, step))] if axis in (-1, 2) else None
    if is_call(user, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        parts = user.meta["val"]
        axis = user.args[2] if len(user.args) > 2 else 0
        if axis not in (-1, 2) or not all(is_call(item, operator.getitem) for item in user.users):
            return None
        edges = list(itertools.accumulate((int(part.shape[2]) for part in parts), initial=0))
        return [(item, slice(*edges[item.args[1] :][:2])) for item in user.users]
    return None
