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

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.formats import NUMBERS, as_scales
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.weights import Convert, MadeWeights, Weights
from doubleweave.sources.file_weights import computed_rows

LEVELS = 15
# Parts of half of what a group spans. More of them, or more turns, bring divergence no further down (docs/design.md).
_REACHES = (1.0, 0.9, 0.8)
_TURNS = 3


def with_best_grids(
    torch_split: TorchSplit, places: Collection[Place], importance: Mapping[Place, Tensor]
) -> TorchSplit:
    """The split whose weights at `places`, [N, K] each, lie on grids of 16 numbers in each group of columns.

    `importance` is the mean square of what each column multiplies, [K]; a weight without one has columns alike.
    """
    # A table that is a linear's weights too stays the same numbers.
    same = {Place(*table): Place(*linear) for table, linear in torch_split.tied.items()}
    by_segment: defaultdict[str, list[int]] = defaultdict(list)
    for place in (*places, *(table for table, linear in same.items() if linear in places)):
        by_segment[place.segment].append(place.weight)

    def rounding(segment: str) -> Convert:
        def convert(weights: Weights) -> Weights:
            found = list(weights)
            for number in by_segment[segment]:
                place = Place(segment, number)
                found[number] = _rounded(weights[number], importance.get(same.get(place, place)))
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
        step = max(1, NUMBERS // numbers.shape[1])
        return torch.cat([on_best_grid(block, each) for block in torch.split(numbers, step)])

    return computed_rows(weight, compute)


class GridSearch:
    """Of groups float32 [N, K/32, 32], the grids considered so far whose errors count least, by the importance of each
    column, [K]: the numbers `start + step * level` for levels from 0 to 15, [N, K/32, 1] each.
    """

    def __init__(self, groups: Tensor, importance: Tensor, step: Tensor, start: Tensor) -> None:
        each = importance.view(1, -1, GROUP_SIZE)
        # A group whose columns nothing reached has columns alike.
        self._each = torch.where(each.sum(dim=2, keepdim=True) > 0, each, torch.ones_like(each))
        self._weight = self._each.sum(dim=2, keepdim=True)
        self._groups, self.step, self.start = groups, step, start
        self._least = torch.full_like(step, torch.inf)

    def consider(self, step: Tensor, start: Tensor) -> None:
        error = levels_on(self._groups, step, start).mul_(step).add_(start).sub_(self._groups)
        total = error.square_().mul_(self._each).sum(dim=2, keepdim=True)
        is_less = total < self._least
        self._least = torch.where(is_less, total, self._least)
        self.step, self.start = torch.where(is_less, step, self.step), torch.where(is_less, start, self.start)

    def sum(self, numbers: Tensor) -> Tensor:
        """Of numbers shaped like the groups, each as often as its column counts."""
        return (numbers * self._each).sum(dim=2, keepdim=True)

    def mean(self, numbers: Tensor) -> Tensor:
        return self.sum(numbers) / self._weight


def on_best_grid(weight: Tensor, importance: Tensor) -> Tensor:
    """float32 [N, K], importance [K] -> the weight's nearest numbers on the best grids found."""
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    found = best_grids(groups, importance)
    return levels_on(groups, found.step, found.start).mul_(found.step).add_(found.start).view_as(weight)


def best_grids(groups: Tensor, importance: Tensor) -> GridSearch:
    """The best grids found for groups float32 [N, K/32, 32], by the importance of each column, [K]."""
    low, high = groups.aminmax(dim=2, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    search = GridSearch(groups, importance, torch.ones_like(low), low)
    for reach in _REACHES:
        step = as_scales(half * (2 * reach / LEVELS))
        search.consider(step, middle - step * (LEVELS / 2))
    mean = search.mean(groups)
    for _ in range(_TURNS):
        levels = levels_on(groups, search.step, search.start)
        mean_level = search.mean(levels)
        levels.sub_(mean_level)
        slope = search.sum(levels * groups) / search.sum(levels.square())
        step = as_scales(slope.nan_to_num(nan=0.0))
        search.consider(step, mean - step * mean_level)
    return search


def levels_on(groups: Tensor, step: Tensor, start: Tensor) -> Tensor:
    return ((groups - start) / step).round_().clamp_(0, LEVELS)
