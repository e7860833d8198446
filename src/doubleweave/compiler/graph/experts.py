"""Mixtures of experts as operators of ours.

transformers' experts modules ask `ExpertsInterface` for the function that computes them; ours calls `expert_linear` for
each of the two products and leaves the gate in between to the module. The router stays the model's own operators. This
module knows nothing of segments, quantization or backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.errors import SplitError

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
