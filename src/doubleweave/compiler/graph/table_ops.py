"""The operator Doubleweave adds to PyTorch for tables that are only looked up: rows of 8, 4 or 16 bits, as they lie in
the program's file.

As in ops.py, eager mode computes a reference in plain operators, and a program calls the `.out` overload
(native/src/table_operators.cpp). A head's weights for XNNPACK have the same bytes, so a tied table is in a file once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doubleweave.compiler.graph.linear_ops import dequantized
from doubleweave.compiler.graph.ops import _LIBRARY

_TABLE = "Tensor table, Tensor? scales, Tensor index, Tensor? offsets, Tensor? offset_scales"
_LIBRARY.define(f"table_rows({_TABLE}) -> Tensor")
_LIBRARY.define(f"table_rows.out({_TABLE}, *, Tensor(a!) out) -> Tensor(a!)")


def table_rows_reference(
    table: Tensor, scales: Tensor | None, index: Tensor, offsets: Tensor | None, offset_scales: Tensor | None
) -> Tensor:
    """Rows of a table in float32: index int64 [..] -> [.., K].

    table bfloat16 [V, K]; or int8 [V, K] and scales float32 [V]; or `nibbles` int8 [V, K / 2], scales bfloat16 [V, G],
    offsets int8 [V, G] and offset_scales float32 [V], as in linear_ops.py.
    """
    rows = table[index.flatten()]
    if scales is None:
        found = rows.to(torch.float32)
    elif offsets is None or offset_scales is None:
        found = dequantized(rows, scales[index.flatten()])
    else:
        parts = (part[index.flatten()] for part in (scales.to(torch.float32), offsets, offset_scales))
        found = dequantized(torch.stack(((rows & 15) - 8, (rows >> 4 & 15) - 8), dim=2).flatten(1), *parts)
    return found.view(*index.shape, -1)


def nibbles(values: Tensor) -> Tensor:
    """int8 [V, K] in -8 … 7 -> bytes [V, K / 2] of two that are 8 more, the even one in the low half."""
    even, odd = (values + 8).view(len(values), -1, 2).unbind(2)
    return even | odd << 4


_LIBRARY.impl("table_rows", table_rows_reference, "CompositeExplicitAutograd")
torch.library.register_fake(
    "doubleweave::table_rows",
    lambda table, scales, index, offsets, offset_scales: index.new_empty(
        (*index.shape, table.shape[1] * (1 if offsets is None else 2)), dtype=torch.float32
    ),
    lib=_LIBRARY,
)
torch.library.register_fake("doubleweave::table_rows.out", lambda *args, out: out, lib=_LIBRARY)

TABLE_ROWS = torch.ops.doubleweave.table_rows.default
