"""The split of every supported family, run in eager torch, against the plain model."""

from __future__ import annotations

import pytest
import torch
import transformers

from doubleweave.compiler.graph.export_llm import owned_modules
from doubleweave.compiler.graph.ops import attention_reference, rotary_reference
from doubleweave.compiler.split.eager import run_eager
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.errors import InputError, SplitError
from doubleweave.ir.split import FixedSizes, SizeRanges, rows
from exports import export_llm

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name -> (config class, what it adds, attention segments it needs)
FAMILIES = {
    "llama": ("LlamaConfig", {}, 1),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, 1),
    "qwen2": ("Qwen2Config", {}, 1),
    "qwen3": ("Qwen3Config", {"head_dim": 16}, 1),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}, 2),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        2,
    ),
    "phi3": ("Phi3Config", {}, 1),
    "phi3_partial_rotary": (
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
        1,
    ),
    "mistral": ("MistralConfig", {"sliding_window": 8}, 1),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}, 1),
}


def make_model(family: str) -> torch.nn.Module:
    torch.manual_seed(len(family))
    name, extra, _ = FAMILIES[family]
    config = getattr(transformers, name)(**COMMON, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights start at one and biases at zero: make them tell.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def split(model: torch.nn.Module, shape: FixedSizes | SizeRanges | None = None) -> TorchSplit:
    return split_llm(
        export_llm(model, 128),
        owned_modules(model),
        policy=default_policy(shape or rows(1, 128)),
        max_context=256,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_the_plain_model(family: str) -> None:
    model = make_model(family)
    ids = torch.randint(3, 128, (1, 40))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    torch_split = split(model)
    whole = run_eager(torch_split, ids)
    assert torch.equal(whole, expected) or (whole - expected).abs().max() <= 1e-6
    for chunk in (7, 1):
        chunked = run_eager(torch_split, ids, chunk)
        assert (chunked - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_one_static_segment_more_than_layers(family: str) -> None:
    parts = split(make_model(family)).split
    names = [segment.name for segment in parts.segments]
    assert [name for name in names if name.startswith("block_")] == [f"block_{i}" for i in range(4)]
    assert {"embed_tokens", "rotary", "lm_head"} <= set(names)
    attention = [segment for segment in parts.segments if segment.name.startswith("attention")]
    assert len(attention) == FAMILIES[family][2]
    assert sum(len(list(parts.calls_of(segment.name))) for segment in attention) == 3
    assert all(isinstance(segment.shape, SizeRanges) for segment in attention)


def test_layers_share_one_structure() -> None:
    parts = split(make_model("llama"))
    structures = {s.name: s.structure for s in parts.split.segments}
    assert structures["block_1"] == structures["block_2"] != structures["block_3"]
    assert not torch.equal(parts.weights["block_1"][0], parts.weights["block_2"][0])


def test_projections_are_written_as_cache_rows() -> None:
    """K and V leave a segment as [1, T, heads * dim]: rows that can be bound onto the cache."""
    parts = split(make_model("phi3")).split
    cached = [value for value in parts.values if value.kind == "cache"]
    assert {value.name for value in cached} == {f"{letter}_{layer}" for letter in "kv" for layer in range(3)}
    assert {value.shape for value in cached} == {(1, "T", 32)}


def test_batch_is_refused() -> None:
    parts = split(make_model("llama"))
    with pytest.raises(InputError, match="one sequence"):
        run_eager(parts, torch.zeros(2, 5, dtype=torch.long))


def test_model_without_the_interface_is_refused() -> None:
    """RWKV neither attends nor keeps its states in transformers' cache."""
    config = transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, context_length=64)
    with pytest.raises(SplitError, match=r"rwkv\.blocks\.0\.attention"):
        export_llm(transformers.AutoModelForCausalLM.from_config(config).eval(), 32)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_attention_reference_against_float64(window: int, soft_cap: float) -> None:
    generator = torch.Generator().manual_seed(3)
    num_tokens, num_keys, heads, kv_heads, dim = 6, 14, 4, 2, 8
    q = torch.randn(1, num_tokens, heads * dim, generator=generator)
    k = torch.randn(1, num_keys, kv_heads * dim, generator=generator)
    v = torch.randn(1, num_keys, kv_heads * dim, generator=generator)
    out = attention_reference(q, k, v, heads, kv_heads, 0.3, window, soft_cap)
    expected = torch.zeros(num_tokens, heads, dim, dtype=torch.float64)
    for i in range(num_tokens):
        position = num_keys - num_tokens + i
        first = max(0, position - window + 1) if window else 0
        for head in range(heads):
            kv = head // (heads // kv_heads)
            keys = k.double().view(num_keys, kv_heads, dim)[first : position + 1, kv]
            scores = keys @ q.double().view(num_tokens, heads, dim)[i, head] * 0.3
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            values = v.double().view(num_keys, kv_heads, dim)[first : position + 1, kv]
            expected[i, head] = torch.softmax(scores, 0) @ values
    assert (out.double().view(num_tokens, heads, dim) - expected).abs().max() < 1e-6


def test_rotary_reference_turns_pairs() -> None:
    """A rotation keeps the length of each pair (x[i], x[i + R/2]) and turns it by the position's angle."""
    angle = torch.tensor([[[0.3, 0.7, 0.3, 0.7]]])
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0, 5.0]]])
    out = rotary_reference(x, angle.cos(), angle.sin(), 1)[0, 0]
    expected = [torch.cos(torch.tensor(0.3)), -torch.sin(torch.tensor(0.7))]
    assert torch.allclose(out[:2], torch.stack(expected))
    assert out[4] == 5.0
