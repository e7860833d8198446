"""How far results may be apart by rounding alone: bounds, and a module that runs with other rounding.

It knows nothing of programs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Of the largest number, and of each number: kernels that add up in another order are off by less.
_BOUNDS = {torch.bfloat16: (5e-2, 5e-2), torch.float16: (1e-2, 1e-2), torch.float64: (1e-9, 1e-8)}
_FLOAT32_BOUNDS = (2e-5, 1e-4)
# Results of a choice: equal numbers may be chosen between in another order.
_CHOICES = ("argmax", "argmin", "argsort", "sort", "topk", "max.dim", "min.dim", "kthvalue", "median", "mode")


class Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context each operator's results are rounded otherwise: off by some units in the last place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(20261)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.startswith(_CHOICES):
            args = tree_map(lambda leaf: self._apart(leaf) if isinstance(leaf, Tensor) else leaf, args)
        results = func(*args, **(kwargs or {}))
        if any(found.alias_info for found in func._schema.returns):  # a view, or a change in place
            return results
        return tree_map(lambda leaf: self._rounded(leaf) if isinstance(leaf, Tensor) else leaf, results)

    def _rounded(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor * (1 + 16 * torch.finfo(tensor.dtype).eps * self._noise(tensor))

    def _apart(self, tensor: Tensor) -> Tensor:
        """Numbers of which no two are equal."""
        wide = tensor.double()
        finite = wide[wide.isfinite()].abs()
        scale = max(1e-30, float(finite.max())) if finite.numel() else 1.0
        eps = torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float32).eps
        return wide + 16 * eps * scale * self._noise(tensor).double()

    def _noise(self, tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=self._generator).to(tensor.dtype)


def excess(found: Tensor, wanted: Tensor, more: Tensor | None = None) -> float:
    """The largest difference, as a part of what rounding may give, or of that and `more`; 0 for equal numbers.

    A number that should be NaN may be any.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    a, b = found.double(), wanted.double()
    off = torch.where((a == b) | b.isnan(), 0.0, (a - b).abs())
    allowed = torch.zeros_like(b) if more is None else more
    if wanted.is_floating_point():
        of_largest, of_each = _BOUNDS.get(wanted.dtype, _FLOAT32_BOUNDS)
        finite = b[b.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        allowed = allowed + of_largest * largest + of_each * b.abs() + torch.finfo(wanted.dtype).tiny
    parts = torch.where((off == 0) | (allowed == math.inf), 0.0, off / allowed)
    return float(parts.nan_to_num(nan=math.inf, posinf=math.inf).max()) if parts.numel() else 0.0


def spread(wanted: Tensor, rounded: Sequence[Tensor]) -> Tensor:
    """How far each number may be off where operators round otherwise: infinitely for an index that changes."""
    if any(found.shape != wanted.shape for found in rounded):
        return torch.full_like(wanted, math.inf, dtype=torch.float64)
    off = torch.stack([(found.double() - wanted.double()).abs() for found in rounded]).amax(0)
    if not wanted.is_floating_point():
        return torch.where(off > 0, math.inf, 0.0)
    # What other rounding makes another number altogether has no digits to compare.
    is_noise = (off > 0) & (4 * off >= wanted.double().abs())
    return torch.where(is_noise, math.inf, (4 * off).nan_to_num(nan=math.inf))
