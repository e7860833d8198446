"""Weights that were quantized before are known by their numbers, and keep their integers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Types
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st

from doubleweave.compiler.graph.linear_ops import dequantized
from doubleweave.compiler.quantize.formats import INT4, INT4_OFFSETS
from doubleweave.compiler.quantize.grids import GROUP_SIZE, find_grid, find_symmetric_grid, format_of

ROWS, COLUMNS = 6, 256


def random(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def as_in_a_file(kind: Types) -> torch.Tensor:
    """Random weights that were quantized for a GGUF file and made float32 again."""
    if kind in (Types.Q4_K, Types.Q6_K):  # gguf reads these and does not write them
        of_block, bytes_of_block = gguf.GGML_QUANT_SIZES[kind]
        rows = np.random.default_rng(0).integers(
            0, 256, (ROWS, COLUMNS // of_block * bytes_of_block), np.uint8
        )
        scales = {Types.Q4_K: (0, 2), Types.Q6_K: (208,)}[kind]  # float16, which not every two bytes are
        for at in scales:
            for start in range(at, rows.shape[1], bytes_of_block):
                rows[:, start : start + 2] = np.frombuffer(np.float16(0.01 + at / 100).tobytes(), np.uint8)
        return torch.from_numpy(quants.dequantize(rows, kind).copy())
    return torch.from_numpy(quants.dequantize(quants.quantize(random().numpy(), kind), kind).copy())


def groups_of(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1, GROUP_SIZE)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Types.Q4_0, "int4"),  # its scales may be negative
        (Types.Q4_1, "int4_offsets"),
        (Types.Q4_K, "int4_offsets"),
        (Types.Q5_0, "int8"),
        (Types.Q5_1, "int8"),
        (Types.Q6_K, "int8"),
        (Types.Q8_0, "int8"),
    ],
)
def test_what_a_file_has(kind, expected):
    assert format_of(groups_of(as_in_a_file(kind))) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_were_never_quantized(dtype):
    for seed in range(20):
        assert format_of(groups_of(random(seed).to(dtype).float())) is None


def test_a_grid_around_zero():
    levels = torch.randint(-8, 8, (40, GROUP_SIZE))
    assert format_of(levels * (torch.rand(40, 1) + 0.1)) == "int4"
    assert format_of(torch.sign(random()).view(-1, GROUP_SIZE)) == "int4"


def test_numbers_that_are_none():
    assert format_of(torch.zeros(4, GROUP_SIZE)) is None
    assert format_of(torch.full((4, GROUP_SIZE), torch.nan)) is None


@given(st.integers(1, 15), st.integers(0, 2**31))
def test_every_count_of_steps_is_found(count, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, count + 1, (8, GROUP_SIZE), generator=generator)
    low, step = (torch.rand(8, 1, generator=generator) - 0.5 for _ in range(2))
    groups = low + levels * step.abs().clamp(min=1e-3)
    grid = find_grid(groups)
    assert grid.fits.all()
    found = (groups - grid.low[:, None]) / grid.step.clamp(min=1e-30)[:, None]
    assert (found - found.round()).abs().max() < 0.01
    assert found.max() < 15.5


@given(st.integers(0, 2**31))
def test_a_symmetric_grid_has_eight_steps_to_one_side(seed):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-8, 8, (8, GROUP_SIZE), generator=generator)
    levels[0, :2] = torch.tensor([8, -8])
    levels[1, 0], levels[2, 0] = -8, 7
    levels[3] = -levels[1]
    grid = find_symmetric_grid(levels * 0.3)
    assert not grid.fits[0]
    assert grid.fits[1:].all()
    found = levels * 0.3 / grid.step[:, None]
    assert (found[1:] > -8.5).all()
    assert (found[1:] < 7.5).all()
    assert grid.step[1] > 0 > grid.step[3]


@pytest.mark.parametrize("kind", [Types.Q4_0, Types.Q4_1, Types.Q4_K])
def test_integers_are_kept(kind):
    weight = as_in_a_file(kind)
    found = dequantized(*INT4_OFFSETS.convert(weight))
    steps = find_grid(groups_of(weight)).step.view(ROWS, -1).amax(dim=1, keepdim=True)
    off = (found - weight).abs() / steps
    # Scales have 8 digits, offsets as many bits of the largest of their row.
    assert off.max() < 0.1
    assert off.mean() < 0.02
    rounded = dequantized(*INT4.convert(weight))
    if kind == Types.Q4_0:  # around zero: scales alone are rounded
        assert ((rounded - weight).abs() <= 2**-8 * weight.abs()).all()
    else:
        assert (found - weight).square().mean() < 0.01 * (rounded - weight).square().mean()


@given(st.integers(0, 2**31), st.sampled_from([32, 576, 1056]))
def test_other_weights_move_by_half_a_step(seed, columns):
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    parts = INT4_OFFSETS.convert(weight)
    assert [tuple(part.shape) for part in parts] == [(3, columns), *2 * [(3, columns // 32)], (3,)]
    assert [part.dtype for part in parts] == [torch.int8, torch.float32, torch.int8, torch.float32]
    assert -8 <= int(parts[0].min()) <= int(parts[0].max()) <= 7
    assert (parts[1] > 0).all()
    assert torch.equal(parts[1], parts[1].to(torch.bfloat16).to(torch.float32))
    low, high = groups_of(weight).aminmax(dim=1)
    steps = ((high - low) / 15).view(3, -1).repeat_interleave(GROUP_SIZE, dim=1)
    assert ((dequantized(*parts) - weight).abs() < 0.75 * steps).all()


def test_weights_of_one_number():
    for number in (0.0, 3.0):
        weight = torch.full((2, 64), number)
        assert torch.allclose(dequantized(*INT4_OFFSETS.convert(weight)), weight, atol=1e-20 + 0.02 * number)
