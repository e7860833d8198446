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
from torch.nn.functional import pad

from doubleweave.compiler.graph.linear_ops import INT8_GROUP
from doubleweave.compiler.graph.table_ops import nibbles
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
_LEAST_SCALE = 2.0**-100  # none is zero, or loses its last bits


@dataclass(frozen=True)
class Format:
    """`convert` makes the parts of a weight [N, K], float32; `parts` are their names."""

    name: str
    parts: tuple[str, ...]
    convert: Callable[[Tensor], Parts]


def _without_numbers(convert: Callable[[Tensor], Parts], weight: FakeTensor) -> Parts:
    """The parts of a weight whose shape alone is known: conversions look at numbers, so a row of zeros is converted."""
    with unset_fake_temporarily():
        row = convert(torch.zeros(1, int(weight.shape[1])))
    return tuple(weight.new_empty((len(weight), *part.shape[1:]), dtype=part.dtype) for part in row)


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
def int8_per_row(weight: Tensor) -> Parts:
    """float32 [N, K] -> (int8 [N, K] in -127 … 127, scales float32 [N])."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=_LEAST_SCALE)
    return torch.round(weight / scales.unsqueeze(1)).clamp(-127, 127).to(torch.int8), scales


@_by_rows
def int8_per_group(weight: Tensor) -> Parts:
    """float32 [N, K] -> (int8 [N, K] in -127 … 127, scales float32 [N, K/64]), with zeros up to a whole group.

    Scales are rounded to bfloat16, the type in which the kernel reads them.
    """
    groups = pad(weight, (0, -weight.shape[1] % INT8_GROUP)).view(len(weight), -1, INT8_GROUP)
    scales = as_scales(groups.abs().amax(dim=2) / 127)
    values = torch.div(groups, scales.unsqueeze(2)).round_().clamp_(-127, 127).to(torch.int8)
    return values.flatten(1), scales


@_by_rows
def int4_per_group(weight: Tensor) -> Parts:
    """float32 [N, K] -> (int8 [N, K] in -8 … 7, scales float32 [N, K/32]).

    A group that lies on such a grid keeps its integers, and a scale that may be negative (Q4_0). Another takes, of a
    few scales around its largest magnitude, the one with the least squared error. Scales are rounded to bfloat16, the
    type in which the kernel reads them.
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
        on_grid = (grid.fits & (grid.step != 0)).view(largest.shape)
        best_scales = torch.where(on_grid, as_scales(grid.step).view(largest.shape), best_scales)
    torch.div(groups, best_scales, out=found).round_().clamp_(-8, 7)
    return found.to(torch.int8).view(weight.shape), best_scales.squeeze(2)


def as_scales(scales: Tensor) -> Tensor:
    """Rounded as the kernel reads them, and none that is zero."""
    positive = scales.abs().clamp(min=_LEAST_SCALE).to(torch.bfloat16).to(torch.float32)
    return positive.copysign(scales)


@_by_rows
def int4_with_offsets(weight: Tensor) -> Parts:
    """float32 [N, K] -> (int8 [N, K] in -8 … 7, scales float32 [N, K/32], offsets int8 [N, K/32], scales of those
    float32 [N]).

    A group's offset is added to all of its weights. A group that lies on a grid of 16 numbers keeps its integers (Q4_1,
    Q4_K, and best_grids.py); another's reach from its lowest to its highest number.
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
    added = (groups - levels * scales[:, None]).mean(dim=1).view(len(weight), -1)
    offset_scales = (added.abs().amax(dim=1) / 127).clamp(min=_LEAST_SCALE)
    offsets = (added / offset_scales.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return levels.to(torch.int8).view(weight.shape), scales.view(len(weight), -1), offsets, offset_scales


def _begins_on(find: Callable[[Tensor], Grid], groups: Tensor) -> bool:
    """Whether the first groups lie on a grid: to look at each takes longer than all else."""
    return bool(find(groups[:_PROBED_GROUPS]).fits.all())


def rows_of_4_bits(weight: Tensor) -> Parts:
    """A table's: the parts of `int4_with_offsets`, as `table_rows` takes them."""
    values, scales, *offsets = int4_with_offsets(weight)
    return nibbles(values), scales.to(torch.bfloat16), *offsets


@_by_rows
def in_bfloat16(weight: Tensor) -> Parts:
    return (weight.to(torch.bfloat16),)


INT8 = Format("int8", ("values", "scales"), int8_per_group)
INT4 = Format("int4", ("values", "scales"), int4_per_group)
INT4_OFFSETS = Format("int4_offsets", ("values", "scales", "offsets", "offset_scales"), int4_with_offsets)
# Of tables, by the name that `compile_llm` takes.
TABLES = {
    "int8": Format("int8", ("values", "scales"), int8_per_row),
    "int4": Format("int4", INT4_OFFSETS.parts, rows_of_4_bits),
    "bfloat16": Format("bfloat16", ("values",), in_bfloat16),
}
FORMATS = {each.name: each for each in (INT8, INT4, INT4_OFFSETS)}
