"""The operators Doubleweave adds to PyTorch for linears whose weights have 4 bits.

`linear_quantized` multiplies rows, each on an int8 grid of its own, by weights in groups, whose offsets no operator of
PyTorch's has. As in ops.py, eager mode computes a reference in plain operators, and a program calls the `.out` overload
of `linear_packed` (native/src/linear_operators.cpp), which has the weights in the order in which its kernel reads them
(packed_linears.py) and runs in programs alone.

Shape legend: T rows, K input features, N output features, G groups of 32 of K.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor

from doubleweave.compiler.graph.ops import _LIBRARY

qd = torch.ops.quantized_decomposed

PACKED_PARTS = "Tensor? scales, Tensor? sums, Tensor? offsets, Tensor? offset_scales"
_LIBRARY.define(
    "linear_quantized(Tensor x, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? offset_scales=None, "
    "Tensor? bias=None) -> Tensor"
)
_PACKED = f"Tensor x, Tensor weight, {PACKED_PARTS}, Tensor? bias, int in_features, int out_features"
_LIBRARY.define(f"linear_packed({_PACKED}) -> Tensor")
_LIBRARY.define(f"linear_packed.out({_PACKED}, *, Tensor(a!) out) -> Tensor(a!)")


def on_grids(x: Tensor) -> Tensor:
    """Rows float32 [..., K], each rounded to the int8 grid of `choose_qparams_per_token_asymmetric`."""
    grid = (*qd.choose_qparams_per_token_asymmetric(x, torch.int8), -128, 127, torch.int8)
    rounded: Tensor = qd.dequantize_per_token(qd.quantize_per_token(x, *grid), *grid, torch.float32)
    return rounded


def dequantized(
    values: Tensor, scales: Tensor, offsets: Tensor | None = None, offset_scales: Tensor | None = None
) -> Tensor:
    """What int8 [N, K] stands for: float32 [N, K].

    scales float32 [N], or [N, G] for the groups of K; offsets int8 [N, G] times offset_scales float32 [N] are added to
    each weight of a group.
    """
    found = values.to(torch.float32)
    groups = found.view(scales.numel(), -1)
    groups *= scales.reshape(-1, 1)
    if offsets is not None and offset_scales is not None:
        groups += (offsets * offset_scales.unsqueeze(1)).view(-1, 1)
    return found


def linear_quantized_reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    offset_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of rows `on_grids` [..., K] with the weights `dequantized`, and a bias [N]: float32 [..., N]."""
    exact = dequantized(weight, scales, offsets, offset_scales)
    return torch.nn.functional.linear(on_grids(x), exact, bias)


_LIBRARY.impl("linear_quantized", linear_quantized_reference, "CompositeExplicitAutograd")
torch.library.register_fake(
    "doubleweave::linear_quantized",
    lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "doubleweave::linear_packed", lambda x, *parts: x.new_empty(*x.shape[:-1], parts[-1]), lib=_LIBRARY
)
torch.library.register_fake("doubleweave::linear_packed.out", lambda *args, out: out, lib=_LIBRARY)

LINEAR_QUANTIZED = torch.ops.doubleweave.linear_quantized.default
