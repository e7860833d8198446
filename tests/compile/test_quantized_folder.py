"""Quantized folders become the models that transformers makes of them, experts that are stacked on loading as well."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

IDS = torch.arange(12)[None]
TINY = {
    "vocab_size": 264,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def save(folder, config, quantize, settings):
    """A random model of the config, each of whose tensors `quantize` replaces by some."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    quantized = {}
    for name, tensor in tensors.items():
        quantized |= quantize(name, tensor.clone())
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": settings}))
    return folder


def is_what_transformers_makes(folder, quantization_config):
    from transformers import AutoModelForCausalLM

    from doubleweave.sources import load

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config
    ).float()
    ours = load(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours.module(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    assert ours.audit() == ""


def test_fp8_experts(tmp_path):
    from transformers import FineGrainedFP8Config, Qwen3MoeConfig

    def quantize(name, tensor):
        if "_proj" not in name:
            return {name: tensor}
        scale = torch.rand(-(-tensor.shape[0] // 32), -(-tensor.shape[1] // 32)) + 0.5
        return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    config = Qwen3MoeConfig(**TINY, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    save(tmp_path, config, quantize, settings)
    is_what_transformers_makes(tmp_path, FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 32)))


def test_mxfp4_experts(tmp_path):
    from transformers import GptOssConfig, Mxfp4Config

    def quantize(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, columns, rows = tensor.shape
        return {
            f"{name}_blocks": torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8),
            f"{name}_scales": torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8),
        }

    config = GptOssConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    save(tmp_path, config, quantize, {"quant_method": "mxfp4"})
    is_what_transformers_makes(tmp_path, Mxfp4Config(dequantize=True))


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
)
def test_what_bitsandbytes_saves(tmp_path, options):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    from doubleweave.sources import load

    config = LlamaConfig(**{**TINY, "intermediate_size": 128, "head_dim": 32})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**options)
    )
    theirs.save_pretrained(tmp_path / "saved")
    ours = load(tmp_path / "saved")
    # Without gradients bitsandbytes multiplies in bfloat16 on some CPUs.
    found, wanted = ours.module(IDS).logits.detach(), theirs(IDS).logits.detach()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert ours.audit() == ""


def test_quantized_gpt2_is_refused(tmp_path):
    from transformers import GPT2Config

    from doubleweave.errors import SourceError
    from doubleweave.sources import load

    config = GPT2Config(vocab_size=264, n_embd=64, n_layer=1, n_head=4)
    save(tmp_path, config, lambda name, tensor: {name: tensor}, {"quant_method": "fp8"})
    with pytest.raises(SourceError, match="quantized by 'fp8', which is not read for gpt2"):
        load(tmp_path)
