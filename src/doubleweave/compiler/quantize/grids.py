"""Weights that were quantized before, as a GGUF's are: found by their numbers, so that their integers are kept.

Behind a reader that makes float32 of them, and whatever it does to whole rows, a group's numbers still lie on a grid of
a few even steps. Numbers that were never quantized do not: that thirty of them come within a hundredth of a step of one
by chance has a probability of 1e-50. So it does not matter what wrote the file. Knows nothing of graphs or models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from doubleweave.compiler.graph.linear_ops import GROUP_SIZE as GROUP_SIZE

# Of a step: float16 rounds a sum of scale and offset by less (AWQ's and GPTQ's folders), float32 by far less.
_TOLERANCE = 0.01
# What files have of more bits, in groups of 16 too: up to 5 with an offset (Q5_1, Q5_K), up to 8 around zero (Q6_K,
# Q8_0).
_MOST_STEPS, _MOST_SYMMETRIC_STEPS = 31, 128
_PROBED_GROUPS = 16


class Grid(NamedTuple):
    """Of groups [G, N]: whether each lies on a grid, and for those the numbers `low + step * integer`, [G] each."""

    fits: Tensor
    low: Tensor
    step: Tensor


def find_grid(groups: Tensor, most_steps: int = 15) -> Grid:
    """The grid of at most so many steps from its lowest number that each group lies on: groups float32 [G, N]."""
    low, high = groups.aminmax(dim=1)
    return _grid(groups, low, high - low, most_steps, math.inf)


def find_symmetric_grid(groups: Tensor, most_steps: int = 8) -> Grid:
    """The grid around zero, of at most so many steps to one side and one less to the other, that each group lies on.

    Steps are negative where there are more up than down.
    """
    low, high = groups.aminmax(dim=1)
    zero, span = torch.zeros_like(low), torch.maximum(-low, high)
    fits, _, step = _grid(groups, zero, span, most_steps, most_steps - 0.5)
    left = (~fits).nonzero().squeeze(1)
    up = _grid(-groups[left], zero[left], span[left], most_steps, most_steps - 0.5)
    fits[left], step[left] = up.fits, -up.step
    return Grid(fits, zero, step)


def _grid(groups: Tensor, low: Tensor, span: Tensor, most_steps: int, most_up: float) -> Grid:
    fits, step = span == 0, torch.zeros_like(span)
    high = groups.amax(dim=1) - low
    # Half as many steps and fewer are every second of more.
    for count in range(most_steps, most_steps // 2 - 1, -1):
        left = (~fits).nonzero().squeeze(1)
        if len(left) == 0:
            break
        size = span[left] / count
        levels = (groups[left] - low[left, None]).div_(size[:, None])
        is_near = (levels - levels.round()).abs_().amax(dim=1) < _TOLERANCE
        found = left[is_near & (high[left] < most_up * size)]
        fits[found] = True
        step[found] = span[found] / count
    return Grid(fits, low, step)


def _lies_on_halves(groups: Tensor) -> bool:
    """Whether groups, or halves of them, lie on a grid of more steps around zero, or halves on one with an offset."""
    halves = groups.reshape(-1, GROUP_SIZE // 2)
    low, high = halves.aminmax(dim=1)
    return _lies_on(halves, low, high - low, _MOST_STEPS) or any(
        _lies_on(each, torch.zeros(len(each)), each.abs().amax(dim=1), _MOST_SYMMETRIC_STEPS)
        for each in (groups, halves)
    )


def _lies_on(groups: Tensor, low: Tensor, span: Tensor, most_steps: int) -> bool:
    """Whether each group lies on a grid: all counts of steps at once, which takes a hundredth of one by one."""
    counts = torch.arange(most_steps, most_steps // 2, -1).view(-1, 1)
    step = (span / counts).clamp(min=torch.finfo(torch.float32).tiny)
    levels = (groups - low[:, None]) / step.unsqueeze(-1)  # [counts, G, N]
    fits = (levels - levels.round()).abs().amax(dim=-1) < _TOLERANCE
    return bool(fits.any(dim=0).all())


def format_of(groups: Tensor) -> str | None:
    """What holds groups [G, 32] as they were quantized: "int4", "int4_offsets", or "int8" for more bits; None for
    numbers that were not. A few groups say so of a weight: who converts it looks at each again.
    """
    groups = groups[:_PROBED_GROUPS]
    if not groups.any() or not groups.isfinite().all():
        return None
    low, high = groups.aminmax(dim=1)
    if not _lies_on(groups, low, high - low, _MOST_STEPS) and not _lies_on_halves(groups):
        return None
    if find_symmetric_grid(groups).fits.all():
        return "int4"
    return "int4_offsets" if find_grid(groups).fits.all() else "int8"
