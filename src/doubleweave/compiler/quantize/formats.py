"""What a quantized weight is kept as: how it is made from float32, and the tensors it is made of.

Knows nothing of graphs or models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional

from doubleweave.compiler.quantize.grids import GROUP_SIZE, Grid, find_grid, find_symmetric_grid
from doubleweave.sources.file_weights import in_blocks

Parts = tuple[Tensor, ...]

# The steps from zero to a group's largest magnitude. Int4 reaches -8 … 7: more than 7 may cut that weight off, and a
# finer grid for the 31 others can be worth it.
_SCALE_STEPS = (7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5)
# Numbers that are converted at a time: what is computed on the way stays in the processor's cache, where memory for
# whole weights would be mapped and given back at every step (ten times as long for 4 bits).
NUMBERS = 1 << 19
_PROBED_GROUPS = 8
_LEAST_SCALE = 2.0**-100  # XNNPACK refuses scales that are zero or subnormal


# Sums of groups are quantized on the scale of the activations that they are of. This share of them is rarely larger
# than the largest activation, and is rounded less than the sum's own terms are. It is 6/25, so that no share of a sum
# of whole steps lies in the middle between two steps, where kernels round one way or the other.
SUMS_SHARE = 0.24
# Of a quantized weight, in the order of the operators' arguments.
PARTS = ("values", "scales", "zero_points")


@dataclass(frozen=True)
class Format:
    """`convert` makes the parts of a weight [N, K], float32."""

    name: str
    bits: int
    convert: Callable[[Tensor], Parts]


def _without_numbers(convert: Callable[[Tensor], Parts], weight: FakeTensor) -> Parts:
    """The parts of a weight whose shape alone is known: a conversion looks at numbers, so a row of zeros is converted.

    Zero points, which backends look at, have their numbers.
    """
    with unset_fake_temporarily():
        row = convert(torch.zeros(1, int(weight.shape[1])))
    shapes = [(len(weight), *part.shape[1:]) for part in row]
    return tuple(
        weight.new_empty(shape, dtype=part.dtype)
        if part.dtype == torch.int8 or part.is_floating_point()
        else torch.zeros(shape, dtype=part.dtype)
        for part, shape in zip(row, shapes, strict=True)
    )


def _by_rows(convert: Callable[[Tensor], Parts]) -> Callable[[Tensor], Parts]:
    """The same conversion of a weight [N, K], a few rows at a time."""

    @functools.wraps(convert)
    def converted(weight: Tensor) -> Parts:
        weight = weight.detach()
        if isinstance(weight, FakeTensor):
            return _without_numbers(convert, weight)
        rows = max(1, NUMBERS // weight.shape[1])
        if len(weight) <= rows:
            return convert(weight)
        made: Parts = ()
        start = 0
        for block in in_blocks(weight, rows):
            parts = convert(block)
            # All of it at once: parts that stay, between memory that is given back, would keep the heap from shrinking.
            made = made or tuple(part.new_empty(len(weight), *part.shape[1:]) for part in parts)
            for whole, part in zip(made, parts, strict=True):
                whole[start : start + len(part)] = part
            start += len(block)
        return made

    return converted


@_by_rows
def int8_per_channel(weight: Tensor) -> Parts:
    """float32 [N, K] -> (int8 [N, K] in -127 … 127, scales float32 [N], zero points int64 [N])."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=_LEAST_SCALE)
    rounded = torch.round(weight / scales.unsqueeze(1)).clamp(-127, 127).to(torch.int8)
    return rounded, scales, torch.zeros(len(scales), dtype=torch.int64)


@_by_rows
def int4_per_group(weight: Tensor) -> Parts:
    """float32 [N, K] -> (int8 [N, K] in -8 … 7, scales float32 [N, K/32], zero points int32 [N, K/32]).

    A group that lies on such a grid keeps its integers. Another takes, of a few scales around its largest magnitude,
    the one with the least squared error. Scales are rounded to bfloat16, the type in which XNNPACK keeps them.
    """
    groups = weight.view(weight.shape[0], -1, GROUP_SIZE)
    largest = groups.abs().amax(dim=2, keepdim=True)
    best_error = torch.full_like(largest, torch.inf)
    best_scales, found = torch.empty_like(largest), torch.empty_like(groups)
    for steps in _SCALE_STEPS:
        scales = as_scales(largest / steps)
        torch.div(groups, scales, out=found).round_().clamp_(-8, 7)
        error = found.mul_(scales).sub_(groups).square_().sum(dim=2, keepdim=True)
        torch.where(error < best_error, scales, best_scales, out=best_scales)
        torch.minimum(error, best_error, out=best_error)
    flat = weight.reshape(-1, GROUP_SIZE)
    if _begins_on(find_symmetric_grid, flat):
        grid = find_symmetric_grid(flat)
        on_grid = (grid.fits & (grid.step > 0)).view(largest.shape)
        best_scales = torch.where(on_grid, as_scales(grid.step).view(largest.shape), best_scales)
    torch.div(groups, best_scales, out=found).round_().clamp_(-8, 7)
    scales = best_scales.squeeze(2)
    return found.to(torch.int8).view(weight.shape), scales, torch.zeros(scales.shape, dtype=torch.int32)


def as_scales(scales: Tensor) -> Tensor:
    """Rounded as XNNPACK keeps them, and none that it refuses."""
    return scales.clamp(min=_LEAST_SCALE).to(torch.bfloat16).to(torch.float32)


@_by_rows
def int4_with_offsets(weight: Tensor) -> Parts:
    """float32 [N, K] -> the parts of `int4_per_group` for `K + 2 * num_sums(K)` columns.

    Behind the weights come twice `num_sums(K)` columns, of what is added to all weights of a group: in 4 bits, and what
    they leave in 4 bits more. They multiply the sums of each group's activations, which are `SUMS_SHARE` of themselves.
    A group that lies on a grid of 16 numbers keeps its integers (Q4_0, Q4_1, Q4_K, and best_grids.py); another's reach
    from its lowest to its highest number.
    """
    groups = weight.reshape(-1, GROUP_SIZE)
    low, high = groups.aminmax(dim=1)
    step = (high - low) / 15
    if _begins_on(find_grid, groups):
        grid = find_grid(groups)
        step = torch.where(grid.fits, grid.step, step)
    step.clamp_(min=_LEAST_SCALE)
    scales = as_scales(step)
    levels = ((groups - low[:, None]) / step[:, None]).round_().sub_(8).clamp_(-8, 7)
    offsets = (groups - levels * scales[:, None]).mean(dim=1).view(len(weight), -1) / SUMS_SHARE
    columns = functional.pad(offsets, (0, num_sums(weight.shape[1]) - offsets.shape[1]))
    first = int4_per_group(columns)
    second = int4_per_group(columns - dequantize(first[0], first[1]))
    values = torch.cat((levels.to(torch.int8).view(weight.shape), first[0], second[0]), dim=1)
    all_scales = torch.cat((scales.view(len(weight), -1), first[1], second[1]), dim=1)
    return values, all_scales, torch.zeros(all_scales.shape, dtype=torch.int32)


def num_sums(width: int) -> int:
    """The sums of a row's groups, and zeros up to whole groups of them."""
    return -(-width // GROUP_SIZE**2) * GROUP_SIZE


def dequantize(values: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
    """int8 [N, …], scales [N] or, for groups of columns, [N, groups] -> float32 [N, …]."""
    found = values.to(torch.float32)
    groups = found.view(scales.numel(), -1)
    if zero_points is not None and bool(zero_points.any()):
        groups -= zero_points.reshape(-1, 1)
    groups *= scales.reshape(-1, 1)
    return found


def _begins_on(find: Callable[[Tensor], Grid], groups: Tensor) -> bool:
    """Whether the first groups lie on a grid: to look at each takes longer than all else."""
    return bool(find(groups[:_PROBED_GROUPS]).fits.all())


INT8 = Format("int8", 8, int8_per_channel)
INT4 = Format("int4", 4, int4_per_group)
INT4_OFFSETS = Format("int4_offsets", 4, int4_with_offsets)
FORMATS = {each.name: each for each in (INT8, INT4, INT4_OFFSETS)}
