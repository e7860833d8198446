"""The operators Doubleweave adds to PyTorch for mixtures of experts: a linear of its own for each choice of each row.

`expert_linear` multiplies each row by the weights of the experts that it chose, `expert_sum` adds up a row's results.
What lies between two products (a gate, an activation, a norm) stays the model's own operators, so that no table of
activations is needed. Both keep rows apart. `expert_linear_quantized` is `expert_linear` on the int8 grids of a row and
over weights in fewer bits (linear_ops.py).

As in ops.py, eager mode computes a reference in plain operators, and a program calls the `.out` overload
(native/src/linear_operators.cpp). Programs do not take these weights as they are here: `expert_linear_packed` has them
in the order in which its kernel reads them (packed_linears.py), and runs in programs alone.

Shape legend: T rows, C choices of a row, E experts, K input features, N output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doubleweave.compiler.graph.linear_ops import PACKED_PARTS, dequantized, on_grids
from doubleweave.compiler.graph.ops import _LIBRARY

_LINEAR = "Tensor x, Tensor index, Tensor weight"
_LIBRARY.define(f"expert_linear({_LINEAR}, Tensor? bias=None) -> Tensor")
_QUANTIZED = "Tensor scales, Tensor? offsets=None, Tensor? offset_scales=None, Tensor? bias=None"
_LIBRARY.define(f"expert_linear_quantized({_LINEAR}, {_QUANTIZED}) -> Tensor")
for _name, _arguments in (
    (
        "expert_linear_packed",
        f"Tensor x, Tensor index, {PACKED_PARTS}",
    ),
    ("expert_sum", "Tensor x, Tensor scores"),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> Tensor")
    _LIBRARY.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.register_fake(f"doubleweave::{_name}.out", lambda *args, out: out, lib=_LIBRARY)


def _chosen(index: Tensor) -> list[int]:
    return sorted(set(index.flatten().tolist()))


def expert_linear_reference(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of each row with the weights of each expert that it chose.

    x float32 [T, K] (each choice takes the row) or [T, C, K] (each has its own), index int64 [T, C] of experts,
    weight float32 [E, N, K], bias [E, N] -> float32 [T, C, N].
    """
    out = x.new_empty(*index.shape, weight.shape[1])
    each = x.unsqueeze(1).expand(-1, index.shape[1], -1) if x.ndim == 2 else x
    for expert in _chosen(index):
        rows, choices = torch.where(index == expert)
        of_expert = None if bias is None else bias[expert]
        out[rows, choices] = torch.nn.functional.linear(each[rows, choices], weight[expert], of_expert)
    return out


def expert_linear_quantized_reference(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    offset_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`expert_linear` as `linear_quantized` is `linear`: each part has E in front."""
    rounded = on_grids(x)
    out = x.new_empty(*index.shape, weight.shape[1])
    for expert in _chosen(index):  # one at a time: all of them in float32 may be more than there is memory
        parts = (None if part is None else part[expert] for part in (offsets, offset_scales))
        exact = dequantized(weight[expert], scales[expert], *parts)[:, : x.shape[-1]]
        of_expert = None if bias is None else bias[expert : expert + 1]
        chosen = (index == expert).any(1)
        found = expert_linear_reference(
            rounded[chosen], torch.zeros_like(index[chosen]), exact.unsqueeze(0), of_expert
        )
        out[chosen] = torch.where((index[chosen] == expert).unsqueeze(2), found, out[chosen])
    return out


def expert_sum_reference(x: Tensor, scores: Tensor) -> Tensor:
    """The sum of a row's results, weighted: x float32 [T, C, N], scores float32 [T, C] -> [T, N]."""
    return (x * scores.unsqueeze(2)).sum(1)


def _fake_linear(x: Tensor, index: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(*index.shape, weight.shape[1])


for _name, _compute, _fake in (
    ("expert_linear", expert_linear_reference, _fake_linear),
    ("expert_linear_quantized", expert_linear_quantized_reference, _fake_linear),
    ("expert_sum", expert_sum_reference, lambda x, scores: x.new_empty(x.shape[0], x.shape[2])),
):
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"doubleweave::{_name}", _fake, lib=_LIBRARY)
torch.library.register_fake(
    "doubleweave::expert_linear_packed",
    lambda x, index, *parts: x.new_empty(*index.shape, parts[-1]),
    lib=_LIBRARY,
)
