"""Linears in blocks of 4 bits beside the sums of their blocks: the same numbers, on scales of sixteenths."""

from __future__ import annotations

from dataclasses import replace

import torch

import toys
from doubleweave.compiler.backends.qnn.blocks import blocks_of, with_blocks
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.quantize.smooth import smoothed
from doubleweave.compiler.split.eager import run_eager
from exports import split_of

IDS = torch.arange(40)[None]


def test_blocks_are_whole_numbers_of_sixteenths():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator) + torch.randn(64, 1, generator=generator)
    rest, offsets, scales = blocks_of(weight, torch.rand(128, generator=generator))
    assert (offsets.shape, scales.shape) == ((64, 4), (64, 4))
    levels = rest.view(64, 4, GROUP_SIZE) / scales[..., None]
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert levels.min() >= -8.001
    assert levels.max() <= 7.001
    sixteenths = scales / (scales.amax(dim=1, keepdim=True) / 16)
    assert torch.allclose(sixteenths, sixteenths.round(), atol=1e-4)
    moved = rest + offsets.repeat_interleave(GROUP_SIZE, dim=1)
    assert (moved - weight).square().mean() < 0.01 * weight.var()


def test_blocks_that_nothing_reached_lie_on_sixteenths_too():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(8, 128, generator=generator), torch.ones(128)
    importance[32:64] = 0
    rest, offsets, scales = blocks_of(weight, importance)
    sixteenths = scales / (scales.amax(dim=1, keepdim=True) / 16)
    assert torch.allclose(sixteenths, sixteenths.round(), atol=1e-4)
    moved = rest + offsets.repeat_interleave(GROUP_SIZE, dim=1)
    assert (moved - weight).square().mean() < 0.01 * weight.var()


def test_a_split_in_blocks_gives_what_its_weights_say():
    split = split_of(toys.module())
    names = [segment.name for segment in split.split.segments if segment.name.startswith("block")]
    importance = smoothed(split, [IDS]).importance
    blocks, scales = with_blocks(split, names, importance)
    assert set(scales) == set(names)
    # The same by one weight, as it is rounded.
    together = {}
    for name in names:
        weights = list(split.weights[name])
        for weight in scales[name]:
            number = int(weight[1:])
            width = weights[number].shape[1]
            place = importance.get((name, number), torch.ones(width))
            rest, offsets, _ = blocks_of(weights[number].detach(), place)
            weights[number] = rest + offsets.repeat_interleave(GROUP_SIZE, dim=1)
        together[name] = tuple(weights)
    rounded = replace(split, weights={**split.weights, **together})
    found, wanted = run_eager(blocks, IDS), run_eager(rounded, IDS)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found - run_eager(split, IDS)).abs().max() > 1e-2 * wanted.abs().max()


def test_other_segments_stay_what_they_were():
    split = split_of(toys.module())
    blocks, scales = with_blocks(split, ["block_1"], {})
    assert list(scales) == ["block_1"]
    for segment in split.split.segments:
        same = blocks.weights[segment.name] is split.weights[segment.name]
        assert same == (segment.name != "block_1")
