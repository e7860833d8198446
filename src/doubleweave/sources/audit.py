"""An audit of loaded weights: the files are read a second time and compared with the module, without transformers.

Sums over a tensor survive what loading does to it (casts, transposes, stacking, fusing), so they are what is compared.
Knows nothing of formats: it takes tensors by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from doubleweave.sources.file_weights import FileWeight
from doubleweave.sources.tensor_files import listed

# Of the sum of absolute values. Sums are taken in float64, which leaves some 1e-13 to the order of summation.
_TOLERANCE = 1e-9
_CHUNK = 1 << 16  # numbers that are made float64 at once: they stay in the processor's cache


@dataclass(frozen=True)
class Sums:
    """What is compared of some tensors: how many numbers there are, their sum and the sum of their absolute values."""

    count: int = 0
    total: float = 0.0
    absolute: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.total + other.total, self.absolute + other.absolute)

    def agrees(self, other: Sums) -> bool:
        bound = _TOLERANCE * max(self.absolute, other.absolute)
        return (
            self.count == other.count
            and abs(self.absolute - other.absolute) <= bound
            and abs(self.total - other.total) <= bound
        )


def audit(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    module: nn.Module,
    is_harmless: Callable[[str, tuple[int, ...]], bool] = lambda name, shape: False,
) -> str:
    """One sentence where `module` holds other numbers than `tensors`, "" where it holds the same.

    Parameters and saved buffers are compared with the tensor of the same name, those without one (renamed, stacked or
    fused on loading) all together. is_harmless: which tensors the module need not hold. Tied weights count once.
    """
    weights = _weights(module)
    aliases = _aliases(module)
    rest_saved, rest_names, met = Sums(), [], set[str]()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        owner = _owner(name, aliases, getattr(module, "base_model_prefix", ""))
        if owner is None or weights[owner].numel() != tensor.numel():
            if not is_harmless(name, tuple(tensor.shape)):
                rest_saved += sums(tensor)
                rest_names.append(name)
            continue
        if not sums(tensor).agrees(sums(weights[owner])):
            return f"{name}: the loaded weight differs from the one in the file"
        met.add(owner)
    rest = {name: weight for name, weight in weights.items() if name not in met}
    filled = {name: weight for name, weight in rest.items() if not _is_constant_buffer(weight)}
    # Buffers of zeros, say, which newer versions of a model have, may be in the files or not.
    if any(_of(found).agrees(rest_saved) for found in (rest, filled)):
        return ""
    rest_loaded = _of(rest)
    if not rest_names:
        return f"{listed(rest)}: loaded, but in none of the files"
    if not rest:
        return f"{listed(rest_names)}: in the files, but in no loaded weight"
    return (
        f"{listed(rest)}: {rest_loaded.count} loaded numbers with the absolute sum {rest_loaded.absolute:.9g}, where "
        f"the files ({listed(rest_names)}) have {rest_saved.count} with {rest_saved.absolute:.9g}"
    )


def sums(tensor: Tensor) -> Sums:
    """Of the tensor as float32, which is what a model is loaded as."""
    if isinstance(tensor, FileWeight) and tensor.ndim:
        return sum(map(sums, tensor.blocks(max(1, _CHUNK // max(1, math.prod(tensor.shape[1:]))))), Sums())
    flat = tensor.detach().reshape(-1)
    found = Sums(flat.numel())
    for start in range(0, found.count, _CHUNK):
        exact = flat[start : start + _CHUNK].float().double()
        found += Sums(0, float(exact.sum()), float(exact.abs_().sum()))
    return found


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Each parameter and saved buffer once, under the first of its names."""
    kept = set(module.state_dict(keep_vars=True))
    named: list[tuple[str, Any]] = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in named if name in kept}


def _aliases(module: nn.Module) -> dict[str, str]:
    """By each name of a weight the first of them: tied weights have several."""
    first = {id(tensor): name for name, tensor in reversed(_weights(module).items())}
    return {
        name: first[id(tensor)]
        for name, tensor in module.state_dict(keep_vars=True).items()
        if id(tensor) in first
    }


def _owner(name: str, aliases: Mapping[str, str], base: str) -> str | None:
    """The weight that a tensor is loaded into by name; a body that was saved by itself lacks its prefix."""
    for tried in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
        if tried in aliases:
            return aliases[tried]
    return None


def _of(weights: Mapping[str, Tensor]) -> Sums:
    return sum((sums(weight) for weight in weights.values()), Sums())


def _is_constant_buffer(weight: Tensor) -> bool:
    flat = weight.detach().reshape(-1)
    return not isinstance(weight, nn.Parameter) and flat.numel() > 0 and bool((flat == flat[0]).all())
