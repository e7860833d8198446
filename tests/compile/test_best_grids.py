"""Weights on no grid are put on one that logits feel little of, and whose integers are found again."""

from __future__ import annotations

from contextlib import contextmanager

import torch

import toys
from doubleweave.compiler.graph.linear_ops import dequantized
from doubleweave.compiler.quantize.best_grids import _rounded, on_best_grid, with_best_grids
from doubleweave.compiler.quantize.formats import int4_with_offsets
from doubleweave.compiler.quantize.grids import GROUP_SIZE, find_grid
from doubleweave.compiler.quantize.smooth import smoothed
from doubleweave.compiler.quantize.weights import quantize, rounding
from doubleweave.compiler.split.eager import run_eager
from doubleweave.sources.file_weights import FileWeight
from exports import split_of

IDS = torch.arange(40)[None]


def weight_and_importance():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 128, generator=generator), torch.rand(128, generator=generator).pow(4)


def from_lowest_to_highest(weight):
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    return ((groups - low) / step).round().mul(step).add(low).view_as(weight)


def test_the_error_that_counts_is_less():
    weight, importance = weight_and_importance()
    found = on_best_grid(weight, importance)
    errors = [
        ((each - weight).square() * importance).mean() for each in (found, from_lowest_to_highest(weight))
    ]
    assert errors[0] < 0.75 * errors[1]
    alike = on_best_grid(weight, torch.ones(128))
    assert (alike - weight).square().mean() < (found - weight).square().mean()


def test_groups_lie_on_grids_whose_integers_are_found():
    weight, importance = weight_and_importance()
    found = on_best_grid(weight, importance)
    assert find_grid(found.view(-1, GROUP_SIZE)).fits.all()
    parts = int4_with_offsets(found)
    step = parts[1].repeat_interleave(GROUP_SIZE, dim=1)
    assert ((dequantized(*parts) - found).abs() < 0.05 * step).all()


def test_groups_of_equal_numbers_and_of_zeros():
    weight = torch.cat((torch.zeros(2, 32), torch.full((2, 32), 0.3)), dim=1)
    assert torch.allclose(on_best_grid(weight, torch.ones(64)), weight, atol=1e-6)
    assert torch.allclose(on_best_grid(weight, torch.zeros(64)), weight, atol=1e-6)


def test_a_weight_in_a_file_is_rounded_as_one_in_memory():
    weight, importance = weight_and_importance()

    @contextmanager
    def opened():
        yield weight

    found = _rounded(FileWeight(opened, tuple(weight.shape)), importance)
    assert isinstance(found, FileWeight)
    assert torch.equal(found.read(), _rounded(weight, importance))


def test_logits_come_nearer():
    split = split_of(toys.module())
    found = rounding(split, "8da4w")
    assert found.free
    assert not found.grouped
    scaled, importance = smoothed(split, [IDS])
    assert found.free >= importance.keys() - {("lm_head", 0)}
    exact = run_eager(split, IDS)
    searched = with_best_grids(scaled, found.free, importance)
    noise = [(run_eager(quantize(each, "8da4w"), IDS) - exact).square().mean() for each in (searched, scaled)]
    assert noise[0] < 0.95 * noise[1]


def test_what_a_recipe_rounds_to_8_bits_is_left_alone():
    split = split_of(toys.module())
    found = rounding(split, "8da8w")
    assert found == (set(), (), set(), 0.5)
    assert with_best_grids(split, found.free, {}) is split
    assert rounding(split, "none") is None
