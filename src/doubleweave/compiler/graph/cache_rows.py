"""Rows of keys and values in the formats that a cache keeps, in plain torch. Knows nothing of graphs.

float32 rows are [B, T, K*D]: K key-value heads of D numbers. bfloat16 and float16 round each number. int8 rows are
[B, T, K, D + 4]: behind the numbers of a head, in [-127, 127], lie the four bytes of its float32 scale, the largest
magnitude of the head over 127 (the symmetric scheme of llama.cpp's Q8_0, over a head in place of 32 numbers).
native/src/cache_format.cpp writes the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from doubleweave.ir.cache_format import SCALE_BYTES


def stored(rows: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Float32 rows [B, T, K*D] in another format."""
    if dtype != torch.int8:
        return rows.to(dtype)
    heads = rows.view(*rows.shape[:2], num_heads, -1)
    largest = heads.abs().amax(-1, keepdim=True)
    inverse = 127 / largest
    is_finite, is_zero = (heads * 0).sum(-1, keepdim=True) == 0, ~inverse.isfinite()
    scales = torch.where(is_finite, torch.where(is_zero, 0.0, largest / 127), torch.nan)
    numbers = torch.where(is_finite & ~is_zero, (heads * inverse).round(), 0.0).to(torch.int8)
    return torch.cat((numbers, scales.contiguous().view(torch.int8)), -1)


def as_float(rows: Tensor) -> Tensor:
    """Rows of any format as float32 [B, T, K*D]."""
    if rows.dtype != torch.int8:
        return rows.to(torch.float32)
    scales = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES].to(torch.float32) * scales).flatten(2)


def empty_rows(rows: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """What `stored` gives, without numbers."""
    if dtype != torch.int8:
        return rows.new_empty(rows.shape, dtype=dtype)
    width = rows.shape[2] // num_heads + SCALE_BYTES
    return rows.new_empty(rows.shape[0], rows.shape[1], num_heads, width, dtype=dtype)
