"""The operator Doubleweave adds to PyTorch for tables that are only looked up: rows of 8 bits each, as they lie in the
program's file.

As in ops.py, eager mode computes a reference in plain operators, and a program calls the `.out` overload
(native/src/table_operators.cpp). A head's weights for XNNPACK have the same bytes, so a tied table is in a file once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doubleweave.compiler.graph.ops import _LIBRARY

_TABLE = "Tensor table, Tensor scales, Tensor index"
_LIBRARY.define(f"table_rows({_TABLE}) -> Tensor")
_LIBRARY.define(f"table_rows.out({_TABLE}, *, Tensor(a!) out) -> Tensor(a!)")


def table_rows_reference(table: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """Rows of a table in float32: table int8 [V, K], scales float32 [V], index int64 [..] -> [.., K]."""
    return table[index].to(torch.float32) * scales[index].unsqueeze(-1)


_LIBRARY.impl("table_rows", table_rows_reference, "CompositeExplicitAutograd")
torch.library.register_fake(
    "doubleweave::table_rows",
    lambda table, scales, index: scales.new_empty(*index.shape, table.shape[1]),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "doubleweave::table_rows.out", lambda table, scales, index, out: out, lib=_LIBRARY
)

TABLE_ROWS = torch.ops.doubleweave.table_rows.default
