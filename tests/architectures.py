"""A tiny random model of every architecture in transformers' causal mapping. Needs torch and transformers.

Sizes are given by the names that configs share. A model has one layer of each kind that its own config makes: full and
sliding attention, convolutions, recurrences, experts and dense layers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

NAMES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # by model type: the class

# Numbers that no config shares are left at their defaults.
_SIZES = {
    0: ("pad_token_id",),
    0.15: ("initializer_range", "init_std", "init_method_std"),
    1: (
        *("n_group", "topk_group", "num_expert_group", "bos_token_id", "mamba_n_groups", "n_groups"),
        *("first_k_dense_replace", "num_dense_layers", "n_shared_experts", "num_shared_experts"),
        "moe_num_shared_experts",
    ),
    2: (
        *("num_key_value_heads", "multi_query_group_num", "eos_token_id", "linear_num_key_heads"),
        *(
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_k",
            "moe_topk",
            "top_k_experts",
        ),
        *("zero_expert_num", "num_layers_per_stack"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_experts"),
        *(
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_routed_experts",
            "mamba_num_heads",
        ),
        *("linear_num_value_heads", "mamba_n_heads", "encoder_attention_heads"),
        "num_attention_heads_per_layer",
    ),
    8: ("qk_rope_head_dim", "rotary_dim"),
    16: (
        *("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"),
        *("hidden_size_per_layer_input", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"),
        *("state_size", "ssm_state_size", "index_head_dim", "index_topk", "linear_head_dim", "o_lora_rank"),
        *("swa_v_head_dim", "laurel_rank"),
        "index_n_heads",  # so many that hardly two keys have the same score, 0
    ),
    # Of windows and chunks, fewer than a prompt has tokens.
    32: (
        *("sliding_window", "sliding_window_size", "attention_chunk_size", "attention_window_size"),
        *("local_attention", "window_size", "mamba_chunk_size", "chunk_size", "global_head_dim"),
        *("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("expert_ffn_hidden_size", "moe_ffn_hidden_size", "mamba_d_head", "mamba_head_dim"),
        *("shared_experts_intermediate_size", "shared_intermediate_size"),
    ),
    64: (
        "hidden_size",
        "d_model",
        "n_embd",
        "embedding_size",
        "dim",
        "emb_dim",
        "adapter_in_dim",
        "adapter_input_size",
        "adapter_out_dim",
        "hidden_size_global",
    ),
    96: (
        "intermediate_size",
        "ffn_dim",
        "d_ff",
        "dff",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "ffn_hidden_size",
    ),
    264: ("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"),
    512: ("max_position_embeddings", "n_positions", "max_seq_len"),
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_MAMBA_2 = {"num_heads": 8, "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WINDOWED_LATENT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 32,
    "swa_v_head_dim": 16,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_qk_nope_head_dim": 24,
    "swa_qk_rope_head_dim": 8,
}
_MAMBA_AND_EXPERTS = {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 3,
    "expert_layer_offset": 2,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
_SHARED_BLOCK = {
    "attention_head_dim": 32,
    "attention_hidden_size": 128,
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}

# What a config's own rules ask for, and kinds of layers that its defaults do not have.
_MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1},
    "dots3_note_text": _WINDOWED_LATENT,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": _MAMBA_AND_EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": _MAMBA_2,
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 32],
        "attn_layers": ["local", "lsh"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _SHARED_BLOCK,
    "zamba2": {"mamba_headdim": 32, "n_mamba_heads": 4, **_SHARED_BLOCK},
    "zaya": {"num_experts_per_tok": 1},
}


def is_decoder_only(model_type: str) -> bool:
    """Whether the family is one of decoders, not an encoder, or half of an encoder-decoder, that can serve as one."""
    elsewhere = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    return model_type not in (elsewhere - _HEARS) | _HALVES


_HEARS = {"moss_transcribe_diarize"}  # listed for what it does with sound
_HALVES = {"bert-generation", "musicgen", "musicgen_melody", "trocr", "whisper"}


def tiny_model(model_type: str) -> Any:
    """A float32 module in eval mode; raises whatever transformers raises where such sizes make none."""
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[model_type]
    config = kind(**_settings(kind))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):  # some configs have nested ones of full size
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > 50_000_000:
        raise ValueError(f"a model of {count:,} weights, expected a tiny one")
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()


def _settings(kind: Any) -> dict[str, Any]:
    default = kind()
    own = {name: value for name, value in default.__dict__.items() if not name.startswith("_")}
    known = {*inspect.signature(kind.__init__).parameters, *own, *getattr(kind, "__dataclass_fields__", {})}
    found: dict[str, Any] = {name: size for name, size in _BY_NAME.items() if name in known}
    found |= _layers(default, known)
    if rope := own.get("qk_rope_head_dim"):
        # Latent attention: each head has a key of its own, and the head dim may follow from the rotary part.
        found["num_key_value_heads"] = found["num_attention_heads"]
        found["head_dim"] = max(1, int(own.get("head_dim") or rope) // rope) * found["qk_rope_head_dim"]
    for name, value in own.items():
        if isinstance(value, transformers.PretrainedConfig):
            found[name] = _settings(type(value))
    return found | _MORE.get(kind.model_type, {})


def _layers(default: Any, known: set[str]) -> dict[str, Any]:
    """The number of layers, and what the config lists layer by layer: one layer of each kind, and two at least."""
    name = next((name for name in _LAYERS if isinstance(getattr(default, name, None), int)), None)
    number = 0 if name is None else getattr(default, name)
    lists = {
        key: list(value)
        for key, value in default.__dict__.items()
        if isinstance(value, (list, tuple)) and len(value) == number and 0 < len(set(map(str, value))) <= 4
    }
    types = lists.get("layer_types")
    windows = {"sliding_window", "layer_types"} <= known
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    if types and windows and set(types) == {"full_attention"}:
        index = list(lists).index("layer_types")
        last = (*kinds[-1][:index], "sliding_attention", *kinds[-1][index + 1 :])
        kinds = [kinds[0], *kinds[1:-1], last]
    kinds = kinds or [()]
    if "num_kv_shared_layers" in known or len(kinds) == 1:
        kinds *= 2  # the second half shares the keys and values of the first
    found: dict[str, Any] = dict.fromkeys(_LAYERS, len(kinds))
    found["num_kv_shared_layers"] = len(kinds) // 2
    found["use_sliding_window"] = True
    for index, key in enumerate(lists):
        values = [layer[index] for layer in kinds]
        found[key] = [_BY_NAME[key]] * len(values) if key in _BY_NAME else values
    return {key: value for key, value in found.items() if key in known}


def with_random_sinks(module: Any) -> Any:
    """The module with attention sinks that are not zero, as they are made."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    return module
