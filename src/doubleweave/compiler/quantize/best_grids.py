"""Put weights that lie on no grid on the one of 16 numbers in each group that logits feel least.

A weight's error counts as much as the number that it is multiplied with: its square is weighted by the mean square of
the activation (as llama.cpp's importance matrix does, ggml-org/llama.cpp#4861). A group's grid is searched: a few
reaches from its middle, and from the best of them, in turns, the line of least squares through its integers and the
integers nearest to the line. Knows nothing of graphs or models; grids.py finds the integers again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.formats import as_scales
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.weights import Convert, MadeWeights, Weights
from doubleweave.sources.file_weights import computed_rows

LEVELS = 15
# Parts of half of what a group spans. More of them, or more turns, bring divergence no further down (docs/design.md).
_REACHES = (1.0, 0.9, 0.8)
_TURNS = 3
_NUMBERS = 1 << 19  # at a time, so that they stay in the processor's cache


def with_best_grids(
    torch_split: TorchSplit, places: Collection[Place], importance: Mapping[Place, Tensor]
) -> TorchSplit:
    """The split whose weights at `places`, [N, K] each, lie on grids of 16 numbers in each group of columns.

    `importance` is the mean square of what each column multiplies, [K]; a weight without one has columns alike.
    """
    by_segment: defaultdict[str, list[int]] = defaultdict(list)
    for place in places:
        by_segment[place.segment].append(place.weight)

    def rounding(segment: str) -> Convert:
        def convert(weights: Weights) -> Weights:
            found = list(weights)
            for number in by_segment[segment]:
                found[number] = _rounded(weights[number], importance.get(Place(segment, number)))
            return tuple(found)

        return convert

    if not by_segment:
        return torch_split
    weights = MadeWeights(torch_split.weights, {segment: rounding(segment) for segment in by_segment})
    return replace(torch_split, weights=weights)


def _rounded(weight: Tensor, importance: Tensor | None) -> Tensor:
    if isinstance(weight, FakeTensor):
        return weight
    each = torch.ones(weight.shape[1]) if importance is None else importance
    each = each / each.mean().clamp(min=torch.finfo(each.dtype).tiny)

    def compute(numbers: Tensor, rows: slice | Tensor) -> Tensor:
        made = torch.empty_like(numbers)
        step = max(1, _NUMBERS // numbers.shape[1])
        for start in range(0, len(numbers), step):
            block = numbers[start : start + step]
            made[start : start + step] = on_best_grid(block, each)
        return made

    return computed_rows(weight, compute)


class Grids(NamedTuple):
    """Of groups [N, K/32, 32]: the numbers `start + step * level` for levels from 0 to 15, [N, K/32, 1] each."""

    step: Tensor
    start: Tensor


def on_best_grid(weight: Tensor, importance: Tensor) -> Tensor:
    """float32 [N, K], importance [K] -> the weight's nearest numbers on the best grids found."""
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    step, start = best_grids(groups, importance)
    return levels_on(groups, step, start).mul_(step).add_(start).view_as(weight)


def best_grids(groups: Tensor, importance: Tensor) -> Grids:
    """The best grids found for groups float32 [N, K/32, 32], by the importance of each column, [K]."""
    each = importance.view(1, -1, GROUP_SIZE)
    low, high = groups.aminmax(dim=2, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    best_step, best_start = torch.ones_like(low), low

    def consider(step: Tensor, start: Tensor) -> None:
        nonlocal least, best_step, best_start
        error = levels_on(groups, step, start).mul_(step).add_(start).sub_(groups).square_().mul_(each)
        total = error.sum(dim=2, keepdim=True)
        is_less = total < least
        least = torch.where(is_less, total, least)
        best_step, best_start = torch.where(is_less, step, best_step), torch.where(is_less, start, best_start)

    for reach in _REACHES:
        step = as_scales(half * (2 * reach / LEVELS))
        consider(step, middle - step * (LEVELS / 2))
    total = each.sum(dim=2, keepdim=True)
    mean = (groups * each).sum(dim=2, keepdim=True) / total
    for _ in range(_TURNS):
        levels = levels_on(groups, best_step, best_start)
        mean_level = (levels * each).sum(dim=2, keepdim=True) / total
        levels.sub_(mean_level)
        slope = (levels * groups * each).sum(dim=2, keepdim=True)
        slope /= (levels.square_() * each).sum(dim=2, keepdim=True)
        step = as_scales(slope.nan_to_num(nan=0.0))
        consider(step, mean - step * mean_level)
    return Grids(best_step, best_start)


def levels_on(groups: Tensor, step: Tensor, start: Tensor) -> Tensor:
    return ((groups - start) / step).round_().clamp_(0, LEVELS)
