"""Quantization: how far a weight may move, and that a compiled program computes what eager torch does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import PolicyError

pytestmark = pytest.mark.usefixtures("lowered_once")

TOKENS = np.random.default_rng(3).integers(0, toys.VOCAB_SIZE, 60)


@st.composite
def weights(draw):
    """float32 [N, K] with K a multiple of 32, rows of very different sizes, zero rows among them."""
    rows, groups = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]), min_size=rows, max_size=rows))
    return torch.randn(rows, 32 * groups, generator=generator) * torch.tensor(sizes)[:, None]


@given(weights())
def test_int8_moves_a_weight_by_half_a_step_at_most(weight):
    from doubleweave.compiler.quantize.formats import int8_per_group, int8_per_row

    values, scales = int8_per_row(weight)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert values.shape == weight.shape
    assert int(values.min()) >= -127
    assert (scales > 0).all()
    error = (values * scales[:, None] - weight).abs()
    assert (error <= scales[:, None] * 0.5001).all()
    largest = weight.abs().amax(dim=1)
    assert torch.allclose(scales[largest > 1e-10] * 127, largest[largest > 1e-10])
    values, scales = int8_per_group(weight)
    assert values.shape[1] == 64 * scales.shape[1] == -(-weight.shape[1] // 64) * 64
    assert torch.equal(scales, scales.to(torch.bfloat16).to(torch.float32))
    assert not values[:, weight.shape[1] :].any()
    # Rounded to bfloat16, a scale may be half a step of the largest weight too small.
    error = (values * scales.repeat_interleave(64, 1))[:, : weight.shape[1]] - weight
    assert (error.abs() <= scales.repeat_interleave(64, 1)[:, : weight.shape[1]] * 0.75).all()


@given(weights())
def test_int4_moves_a_weight_by_little_and_less_than_plain_rounding(weight):
    from doubleweave.compiler.quantize.formats import int4_per_group
    from doubleweave.compiler.quantize.grids import GROUP_SIZE

    values, scales = int4_per_group(weight)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert -8 <= int(values.min()) <= int(values.max()) <= 7
    assert scales.shape == (weight.shape[0], weight.shape[1] // GROUP_SIZE)
    assert torch.equal(scales, scales.to(torch.bfloat16).to(torch.float32))
    assert (scales > 0).all()
    groups = weight.view(*scales.shape, GROUP_SIZE)

    def squared_error(scale):
        rounded = torch.round(groups / scale[..., None]).clamp(-8, 7)
        return (rounded * scale[..., None] - groups).square().sum(dim=2)

    plain = (groups.abs().amax(dim=2) / 7).clamp(min=2.0**-100).to(torch.bfloat16).float()
    assert (squared_error(scales) <= squared_error(plain)).all()
    found = (values.view(groups.shape) * scales[..., None] - groups).square().sum(dim=2)
    assert torch.equal(found, squared_error(scales))


def split_of(recipe, folder=None):
    """The toy's split as it is lowered; `folder` has the tokenizer by which its channels are scaled."""
    from doubleweave.compiler.quantize.best_grids import with_best_grids
    from doubleweave.compiler.quantize.calibration import Calibration
    from doubleweave.compiler.quantize.smooth import smoothed
    from doubleweave.compiler.quantize.tables import quantize_tables
    from doubleweave.compiler.quantize.weights import quantize, rounding
    from exports import split_of as exported

    split = exported(toys.module(), 32)
    if folder is not None:
        text = Calibration(folder / "tokenizer.json", 32, toys.VOCAB_SIZE).first_tokens(toys.MAX_CONTEXT)
        if (found := rounding(split, recipe)) is not None:
            split, importance = smoothed(split, text, found.grouped)
            split = with_best_grids(split, found.free, importance)
    quantized = quantize(split, recipe)
    return quantized if recipe == "none" else quantize_tables(quantized)


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_compiled_program_agrees_with_the_split_in_eager_torch(recipe, request):
    import doubleweave
    from doubleweave import _native
    from doubleweave.compiler.split.cache_format import with_cache_format
    from doubleweave.compiler.split.eager import run_eager

    folder = request.getfixturevalue(f"toy_{recipe}_dir")
    program = doubleweave.open(folder)
    assert program.manifest.model.quantize == recipe
    with torch.no_grad():
        compiled = with_cache_format(split_of(recipe, folder), "bfloat16")  # such a recipe's default
        wanted = run_eager(compiled, torch.from_numpy(TOKENS)[None])[0].numpy()
        exact = run_eager(split_of("none"), torch.from_numpy(TOKENS)[None])[0].numpy()
    # Queries as they are: those that products of bfloat16 round would move more activations to the other side.
    before = _native.attention_isa()
    _native.set_attention_isa("baseline")
    try:
        found = program.session().score(TOKENS)
    finally:
        _native.set_attention_isa(before)
    largest = np.abs(wanted).max()
    # An activation may round to the other side, so single logits differ; the mean hardly does.
    assert np.abs(found - wanted).max() < 5e-2 * largest
    assert np.abs(found - wanted).mean() < 1e-2 * np.abs(wanted).mean()
    # Quantizing itself moves them further: the two are compared with more than chance.
    assert np.abs(exact - wanted).mean() > 2 * np.abs(found - wanted).mean()


def stored(split, name):
    """The integers that a segment's linears and tables are stored as."""
    ours = torch.ops.doubleweave
    places = {
        ours.linear_quantized.default: 1,
        ours.linear_rows.default: 1,
        ours.table_rows.default: 0,
    }
    module = split.module(name)
    nodes = [node for node in module.graph.nodes if node.target in places]
    return [module.get_buffer(node.args[places[node.target]].target) for node in nodes]


def test_linears_and_tables_are_quantized_and_the_head_keeps_8_bits():
    for recipe, block_range in (("8da8w", 127), ("8da4w", 8)):
        split = split_of(recipe)
        largest = {
            name: max((int(t.abs().max()) for t in stored(split, name)), default=0) for name in split.weights
        }
        assert largest["rotary"] == largest["attention"] == 0
        assert largest["embed_tokens"] == 127
        assert largest["block_1"] == block_range
        assert largest["lm_head"] == 127


def test_none_changes_nothing():
    split = split_of("none")
    assert all(t.is_floating_point() for tensors in split.weights.values() for t in tensors)


@pytest.mark.parametrize("recipe", ["", "int8", "8DA8W", "q4_0"])
def test_unknown_recipes(recipe, tmp_path):
    import doubleweave
    from doubleweave.compiler.quantize.weights import quantize

    message = f"quantize: found '{recipe}', expected one of 8da8w, 8da4w, none"
    with pytest.raises(PolicyError, match=message):
        quantize(None, recipe)
    with pytest.raises(PolicyError, match=message):
        doubleweave.compile_llm(toys.model(), tmp_path / "out", quantize=recipe)
    assert not list(tmp_path.iterdir())


def on_a_grid(parameter, bits):
    """Fill a weight with numbers of so many bits a group, with an offset."""
    levels = torch.randint(0, 1 << bits, (parameter.numel() // 32, 32)).float()
    levels[:, :2] = torch.tensor([0.0, (1 << bits) - 1])
    low, step = torch.randn(len(levels), 1) * 0.1, (torch.rand(len(levels), 1) + 0.5) * 0.5 / (1 << bits)
    parameter.copy_((low + levels * step).view_as(parameter))


@pytest.mark.parametrize("has_four", [True, False])
def test_more_bits_are_kept_beside_four_alone(has_four):
    """As llama.cpp's mixtures have them: the values' projections in 5 bits, all else in 4, or all in 5."""
    from doubleweave.compiler.quantize.weights import quantize
    from exports import split_of as exported

    module = toys.module()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                on_a_grid(parameter, 5 if "v_proj" in name or not has_four else 4)
    split = exported(module, 16)
    quantized = quantize(split, "8da4w")
    wide = {
        name: sum(int(t.abs().max()) > 8 for t in stored(quantized, name)) for name in ("block_1", "lm_head")
    }
    assert wide == {"block_1": 1 if has_four else 0, "lm_head": 1}
    exact, rounded = split.module("block_1"), quantized.module("block_1")
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8, *map(int, port.shape[2:])) for port in split.split.segment("block_1").inputs]
    pairs = zip(exact(*inputs), rounded(*inputs), strict=True)
    noise = max(float((a - b).norm() / a.norm()) for a, b in pairs)
    # Activations alone are rounded where the integers are kept.
    assert (noise < 0.01) == has_four
