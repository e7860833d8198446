"""A tiny random model of every architecture in transformers' causal mapping. Needs torch and transformers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # by model type: the class

# By the names that configs give them. Numbers that no config shares are left at their defaults.
_SIZES = {
    1: ("n_group", "topk_group", "num_expert_group", "bos_token_id"),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_key_value_heads"),
        *(
            "multi_query_group_num",
            "num_experts_per_tok",
            "moe_k",
            "moe_topk",
            "top_k_experts",
            "index_n_heads",
        ),
        *("linear_num_key_heads", "eos_token_id"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "num_experts"),
        *(
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_routed_experts",
            "linear_num_value_heads",
        ),
        *("mamba_n_heads", "mamba_num_heads"),
    ),
    8: ("qk_rope_head_dim",),
    16: (
        *("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "q_lora_rank", "kv_lora_rank"),
        *("hidden_size_per_layer_input", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_state"),
        *("state_size", "ssm_state_size", "index_head_dim", "index_topk"),
    ),
    32: (
        *("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("expert_ffn_hidden_size", "moe_ffn_hidden_size", "mamba_d_head", "mamba_head_dim"),
    ),
    64: ("hidden_size", "d_model", "n_embd", "embedding_size", "dim"),
    96: ("intermediate_size", "ffn_dim", "d_ff", "dff", "decoder_ffn_dim"),
    264: ("vocab_size", "vocab_size_per_layer_input"),
    512: ("max_position_embeddings", "n_positions", "max_seq_len"),
    0: ("pad_token_id", "num_kv_shared_layers"),
    0.15: ("initializer_range", "init_std"),
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names}
# What a config's own checks ask for beyond common names.
_MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "reformer": {"is_decoder": True},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(model_type: str) -> Any:
    """A float32 module in eval mode; raises whatever transformers raises where such sizes make none."""
    torch.manual_seed(0)
    kind = transformers.CONFIG_MAPPING[model_type]
    config = kind(**_settings(kind) | _MORE.get(model_type, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):  # some configs have nested ones of full size
        count = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if count > 50_000_000:
        raise ValueError(f"a model of {count:,} weights, expected a tiny one")
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()


def _settings(kind: Any) -> dict[str, Any]:
    default = kind()
    known = {*inspect.signature(kind.__init__).parameters, *getattr(default, "__dict__", {})}
    known |= set(getattr(kind, "__dataclass_fields__", {}))
    found: dict[str, Any] = {name: size for name, size in _BY_NAME.items() if name in known}
    for part in ("text_config", "vision_config", "audio_config"):
        inner = getattr(default, part, None)
        if isinstance(inner, transformers.PretrainedConfig):
            found[part] = _settings(type(inner))
    return found
