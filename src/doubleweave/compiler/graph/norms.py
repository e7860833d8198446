"""Recognise RMSNorm in the operators that models write it in."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import is_call

aten = torch.ops.aten


def match_rms_norm(node: Any) -> tuple[Any, Any, float] | None:
    """(x, weight, eps) of weight * (x * rsqrt(mean(x², -1) + eps))."""
    for weight, normed in (node.args[:2], node.args[1::-1]):
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr" and is_call(normed, aten.mul.Tensor)):
            continue
        for x, inverse in (normed.args[:2], normed.args[1::-1]):
            if not is_call(inverse, aten.rsqrt.default) or not is_call(inverse.args[0], aten.add.Tensor):
                continue
            mean, eps = inverse.args[0].args[:2]
            if not is_call(mean, aten.mean.dim) or list(mean.args[1]) != [-1] or not isinstance(eps, float):
                continue
            square = mean.args[0]
            if is_call(square, aten.pow.Tensor_Scalar) and square.args[0] is x and square.args[1] == 2:
                return x, weight, eps
    return None
