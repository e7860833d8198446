"""Quantized weights come out as their method defines them: packed here number by number, or by the method's library."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from doubleweave.errors import SourceError
from doubleweave.sources import dequantize, quantized_folder
from doubleweave.sources.saved_tensors import SavedTensors

ROWS, COLUMNS = 64, 96


def packed(values: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of unsigned numbers as int32 words, one stream of bits a row, lowest first."""
    words = []
    for row in values:
        stream = "".join(format(int(value), f"0{bits}b")[::-1] for value in row)
        stream += "0" * (-len(stream) % 32)
        words.append([int(stream[at : at + 32][::-1], 2) for at in range(0, len(stream), 32)])
    return torch.from_numpy(np.array(words, np.uint32).view(np.int32))


def numbers(seed: int, bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape)


def scales(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).uniform(0.01, 0.1, shape)).float()


class InMemory(dict, SavedTensors):
    def shape(self, name):
        return tuple(self[name].shape)

    def dtype(self, name):
        return str(self[name].dtype)

    @contextmanager
    def opened(self, names):
        yield [self[name] for name in names]


def plain(settings, tensors, path="folder"):
    found = quantized_folder.PlainTensors(Path(path), settings, InMemory(tensors))
    made = dict(found)
    assert {name: found.shape(name) for name in found} == {
        name: tuple(one.shape) for name, one in made.items()
    }
    with found.opened(list(found)) as saved:
        assert all(torch.equal(one, other) for one, other in zip(saved, made.values(), strict=True))
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_gptq(bits, layout, is_shuffled):
    group_size = 32
    group = np.arange(COLUMNS) // group_size
    if is_shuffled:  # desc_act
        group = np.random.default_rng(3).permutation(group)
    values, zeros = numbers(1, bits, ROWS, COLUMNS), numbers(2, bits, ROWS, 3)
    scale = scales(ROWS, 3)
    stored = zeros if layout == "gptq_v2" else (zeros - 1) % (1 << bits)
    tensors = {
        "a.qweight": packed(values, bits).T.contiguous(),
        "a.qzeros": packed(stored.T, bits),
        "a.scales": scale.T.half(),
        "a.bias": torch.ones(ROWS),
        "norm.weight": torch.ones(3),
    }
    if is_shuffled:
        tensors["a.g_idx"] = torch.from_numpy(group).int()
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "checkpoint_format": layout}
    found = plain(settings, tensors)
    assert set(found) == {"a.weight", "a.bias", "norm.weight"}
    wanted = (values - zeros[:, group]) * scale.half().double().numpy()[:, group]
    np.testing.assert_allclose(found["a.weight"].numpy(), wanted, rtol=1e-6)


def test_awq():
    group_size = 32
    values, zeros, scale = numbers(1, 4, COLUMNS, ROWS), numbers(2, 4, 3, ROWS), scales(3, ROWS)

    def words(rows):
        # AutoAWQ packs the columns 0, 2, 4, 6, 1, 3, 5, 7 of each eight from the lowest bits up.
        ordered = rows.reshape(len(rows), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return packed(ordered.reshape(rows.shape), 4)

    tensors = {"a.qweight": words(values), "a.qzeros": words(zeros), "a.scales": scale}
    found = plain({"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}, tensors)
    group = np.arange(COLUMNS) // group_size
    wanted = ((values - zeros[group]) * scale.double().numpy()[group]).T
    np.testing.assert_allclose(found["a.weight"].numpy(), wanted, rtol=1e-6)


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True}),
        ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}),
        ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        ("pack-quantized", {"num_bits": 3, "group_size": 48, "strategy": "group", "symmetric": False}),
        ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
        ("float-quantized", {**FLOAT8, "strategy": "channel"}),
        ("float-quantized", {**FLOAT8, "strategy": "tensor"}),
        ("naive-quantized", {**FLOAT8, "strategy": "block", "block_structure": [48, 64]}),
    ],
)
def test_compressed_tensors(layout, weights):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    if args.strategy == "block":
        high, wide = args.block_structure
        parts = [list(band.split(wide, 1)) for band in weight.split(high, 0)]
        low = torch.tensor([[float(part.min()) for part in band] for band in parts])
        top = torch.tensor([[float(part.max()) for part in band] for band in parts])
    elif args.strategy == "tensor":
        low, top = weight.min().reshape(1), weight.max().reshape(1)
    else:
        groups = weight.reshape(ROWS, -1, args.group_size or COLUMNS)
        low, top = groups.amin(-1), groups.amax(-1)
    scale, zero = calculate_qparams(low, top, args)
    wanted = fake_quantize(weight, scale, zero, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    compressor = base.BaseCompressor.get_value_from_registry(layout)
    state = {"weight": weight, "weight_scale": scale}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    saved = compressor.compress(state, scheme)
    settings = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"g": {"weights": weights}},
    }
    saved = {f"a.{name}": tensor for name, tensor in saved.items()} | {"a.input_scale": torch.ones(1)}
    found = plain(settings, saved)
    assert set(found) == {"a.weight"}
    torch.testing.assert_close(found["a.weight"], wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_whole", [True, False])
def test_fp8_in_blocks(is_whole):
    rows, columns, block = (256, 128, 128) if is_whole else (130, 200, 128)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = scales(-(-rows // block), -(-columns // block))
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    found = plain(settings, {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": torch.ones(2)})
    assert set(found) == {"a.weight", "b.weight"}
    wanted = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            wanted[row, column] = float(scale[row // block, column // block])
    wanted *= weight.double().numpy()
    np.testing.assert_allclose(found["a.weight"].numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (ROWS, 1)])
def test_fp8_with_scales_of_rows_or_one(shape):
    weight, scale = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn), scales(*shape)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": torch.ones(1)}
    found = plain({"quant_method": "fbgemm_fp8"}, tensors)
    assert set(found) == {"a.weight"}
    torch.testing.assert_close(found["a.weight"], weight.float() * scale, rtol=1e-6, atol=0)


def test_fp8_without_its_scales():
    with pytest.raises(SourceError, match=r"a\.weight_scale_inv is in none of its files"):
        plain({"quant_method": "fp8"}, {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)})


def test_mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 8, 3, 16), dtype=torch.uint8)
    exponents = torch.randint(120, 132, (2, 8, 3), dtype=torch.uint8)
    tensors = {
        "e.gate_up_proj_blocks": blocks,
        "e.gate_up_proj_scales": exponents,
        "e.gate_up_proj_bias": exponents,
    }
    found = plain({"quant_method": "mxfp4"}, tensors)
    assert set(found) == {"e.gate_up_proj", "e.gate_up_proj_bias"}
    wanted = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
    assert torch.equal(found["e.gate_up_proj"], wanted)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_bitsandbytes_4bit(kind, is_nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(ROWS, 128)  # its kernel for CPUs wants rows of whole blocks
    saved, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=is_nested)
    tensors = {"a.weight": saved}
    tensors |= {f"a.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    found = plain({"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors)
    assert set(found) == {"a.weight"}
    wanted = functional.dequantize_4bit(saved, state)
    torch.testing.assert_close(found["a.weight"], wanted.float(), rtol=1e-5, atol=1e-6)


def test_bitsandbytes_8bit():
    weight = torch.randn(ROWS, COLUMNS)
    largest = weight.abs().amax(1)
    values = (weight / largest[:, None] * 127).round().to(torch.int8)
    tensors = {"a.weight": values, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = plain({"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors)
    assert set(found) == {"a.weight"}
    assert float((found["a.weight"] - weight).abs().max()) <= float(largest.max()) / 253


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(
            ({"quant_method": name}, f"the method '{name}'")
            for name in ("hqq", "quanto", "aqlm", "torchao", "new")
        ),
        ({"w_bit": 4}, "the method 'without a quant_method'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq in the layout 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in the layout 'gemv'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "compressed-tensors in the format 'nvfp4-pack-quantized'",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed-tensors with the sparsity 'sparse-24-bitmask'",
        ),
    ],
)
def test_methods_that_are_not_read(tmp_path, settings, named):
    with pytest.raises(SourceError, match="are quantized by") as error:
        quantized_folder.check_readable(tmp_path, settings)
    assert named in str(error.value)
    assert "before it was quantized" in str(error.value)


def test_parts_that_do_not_fit():
    tensors = {
        "a.qweight": torch.zeros(12, 8, dtype=torch.int32),
        "a.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "a.scales": torch.ones(1, 8),
    }
    with pytest.raises(SourceError, match=r"a\.qweight cannot be dequantized: found 1 groups"):
        plain({"quant_method": "gptq", "group_size": 32}, tensors)
    with pytest.raises(SourceError, match="found 3 scales for 10 numbers"):
        dequantize.scaled(torch.ones(2, 10), torch.ones(2, 3))


def test_settings_are_found_where_configs_have_them():
    given = {"quant_method": "gptq"}
    assert quantized_folder.settings_of({"quantization_config": given}) == given
    assert quantized_folder.settings_of({"text_config": {"quantization_config": given}}) == given
    assert quantized_folder.settings_of(json.loads('{"quantization_config": null}')) is None
