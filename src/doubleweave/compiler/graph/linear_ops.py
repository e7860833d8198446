"""The operators Doubleweave adds to PyTorch for linears whose weights have few bits.

`linear_quantized` multiplies rows by weights in groups, 8 bits with a scale for each 64 input features, or 4 with a
scale and perhaps an offset for each 32. Rows are rounded to 8 bits, each 64 numbers on a grid of their own around zero:
one large number costs its neighbours their last bits, and not the whole row. As in ops.py, eager mode computes a
reference in plain operators. A program calls the `.out` overloads (native/src/linear_operators.cpp) of operators that
run in programs alone: `pack_rows`, which rounds rows once for all linears that read them, and computes them first where
that is a gate's product or a norm; and `linear_packed`, which has the weights in the order in which its kernel reads
them (packed_linears.py). `linear_rows` looks rows up in a linear's weights (`table_rows_packed` in a program), so that
a table that is tied to a head is there once.

Shape legend: T rows, K input features, N output features, G groups of K.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from doubleweave.compiler.graph.ops import _LIBRARY

GROUP_SIZE = 32  # input features of one scale of 4 bits
INT8_GROUP = 64  # input features of one scale of 8 bits, and numbers of a row on one grid
PACKED_PARTS = (
    "Tensor weight, Tensor? scales, Tensor? offsets, Tensor? offset_scales, Tensor? bias, int in_features, "
    "int out_features"
)
_LIBRARY.define(
    "linear_quantized(Tensor x, Tensor weight, Tensor scales, Tensor? offsets=None, Tensor? offset_scales=None, "
    "Tensor? bias=None) -> Tensor"
)
_LIBRARY.define(
    "linear_rows(Tensor index, Tensor weight, Tensor scales, Tensor? offsets, Tensor? offset_scales, "
    "int columns) -> Tensor"
)
for _name, _arguments in (
    ("pack_rows", "Tensor x, Tensor? other, int kind, float epsilon"),
    ("linear_packed", f"Tensor rows, {PACKED_PARTS}"),
    ("table_rows_packed", f"Tensor index, {PACKED_PARTS}"),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> Tensor")
    _LIBRARY.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.register_fake(f"doubleweave::{_name}.out", lambda *args, out: out, lib=_LIBRARY)


def on_grids(x: Tensor) -> Tensor:
    """Rows float32 [..., K], each 64 numbers rounded to 127 steps from zero to the largest of them."""
    padded = pad(x, (0, -x.shape[-1] % INT8_GROUP))
    groups = padded.view(*x.shape[:-1], -1, INT8_GROUP)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    # As the kernel does: what is too small for an inverse becomes zero, and what is not finite stays so.
    inverse = torch.where(largest > 2.0**-100, 127 / largest, torch.zeros_like(largest))
    steps = (groups * inverse).round_().clamp_(-127, 127)
    found: Tensor = (steps * (largest / 127)).view(padded.shape)[..., : x.shape[-1]]
    return found


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


def row_bytes(columns: int) -> int:
    """Bytes of a packed row (linear_row_bytes in native/src/linears.cpp)."""
    used = -(-columns // INT8_GROUP) * 148 + 4
    return -(-used // 64) * 64


def linear_quantized_reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    offset_scales: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The product of rows `on_grids` [..., K] with the weights `dequantized`, and a bias [N]: float32 [..., N].

    Weights of 8 bits have zeros behind the last column, up to a whole group.
    """
    exact = dequantized(weight, scales, offsets, offset_scales)
    return torch.nn.functional.linear(on_grids(x), exact[:, : x.shape[-1]], bias)


def linear_rows_reference(
    index: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    offset_scales: Tensor | None,
    columns: int,
) -> Tensor:
    """Rows of what weights stand for, of a table that is a linear's weights as well: index int64 [..] -> [.., K]."""
    rows = index.flatten()
    parts = (None if part is None else part[rows] for part in (offsets, offset_scales))
    return dequantized(weight[rows], scales[rows], *parts)[:, :columns].reshape(*index.shape, -1)


_LIBRARY.impl("linear_quantized", linear_quantized_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_rows", linear_rows_reference, "CompositeExplicitAutograd")
torch.library.register_fake(
    "doubleweave::linear_rows",
    lambda index, *parts: index.new_empty((*index.shape, parts[-1]), dtype=torch.float32),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "doubleweave::linear_quantized",
    lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "doubleweave::pack_rows",
    lambda x, other, kind, epsilon: x.new_empty(*x.shape[:-1], row_bytes(x.shape[-1]), dtype=torch.int8),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "doubleweave::linear_packed",
    lambda rows, *parts: rows.new_empty(*rows.shape[:-1], parts[-1], dtype=torch.float32),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "doubleweave::table_rows_packed",
    lambda index, *parts: index.new_empty((*index.shape, parts[-2]), dtype=torch.float32),
    lib=_LIBRARY,
)

LINEAR_ROWS = torch.ops.doubleweave.linear_rows.default
LINEAR_QUANTIZED = torch.ops.doubleweave.linear_quantized.default
