"""GGUF files made from tiny modules of transformers, with whatever keys and tensors a test asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY, CONTEXT = 64, 4, 2, 2, 96, 128
EPSILON = 1e-5
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Model types of transformers by the architectures of files, with the names of their epsilon.
ARCHITECTURES = {
    "llama": ("llama", "rms_norm_eps"),
    "qwen2": ("qwen2", "rms_norm_eps"),
    "qwen3": ("qwen3", "rms_norm_eps"),
    "phi3": ("phi3", "rms_norm_eps"),
    "gemma2": ("gemma2", "rms_norm_eps"),
    "gemma3": ("gemma3_text", "rms_norm_eps"),
    "stablelm": ("stablelm", "layer_norm_eps"),
    "starcoder2": ("starcoder2", "norm_epsilon"),
}


def module_of(architecture: str = "llama", model_type: str = "", **more: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    name, epsilon = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type or name](**{**CONFIG, epsilon: EPSILON, **more})
    config._attn_implementation = "eager"
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases that a loader could otherwise leave alone
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def logits(module: Any, num_tokens: int = 60) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (1, num_tokens)))
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, use_cache=False).logits[0]
    return found


def tensors_of(module: Any, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    """The module's weights under the names, and in the layout, of files."""
    import gguf

    arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, LAYERS)
    found = {}
    tied = module.config.tie_word_embeddings
    for name, value in module.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        data = value.numpy()
        if architecture == "llama":
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            if heads:  # the two of a rotary pair lie side by side
                data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(data)
    return found


def write(
    path: Path,
    module: Any,
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    tokens: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """`keys` (of the architecture, or whole ones) and `tensors` are added; None takes one away."""
    found = {**tensors_of(module, architecture), **(tensors or {})}
    return write_tensors(path, architecture, {**keys_of(module, architecture), **(keys or {})}, found, tokens)


def keys_of(module: Any, architecture: str) -> dict[str, Any]:
    config, epsilon = module.config, ARCHITECTURES[architecture][1]
    kind = "attention.layer_norm_rms_epsilon" if "rms" in epsilon else "attention.layer_norm_epsilon"
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        kind: EPSILON,
    }


def write_tensors(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: dict[str, Any],
    tokens: Callable[[Any], None] = lambda writer: None,
) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    tokens(writer)
    for key, value in keys.items():
        whole = (
            key if key.startswith(("general.", "split.", "tokenizer.", "clip.")) else f"{architecture}.{key}"
        )
        if value is not None:
            add(writer, whole, value)
    for name, data in tensors.items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
