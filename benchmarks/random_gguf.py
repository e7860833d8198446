"""GGUF files of random weights in true shapes and types, as llama.cpp's quantize chooses types.

Knows nothing of what is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Of a block's bytes, where its scales lie (float16) and how large they are for weights that vary by about 0.02.
_SCALES = {
    "Q8_0": {0: 2.7e-4},
    "Q5_0": {0: 2.2e-3},
    "Q4_0": {0: 4.3e-3},
    "Q4_K": {0: 6e-5, 2: 7.5 * 6e-5},
    "Q6_K": {208: 1.5e-5},
}
# What llama.cpp falls back to where rows are no multiple of a K-quant's 256.
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
MIX = "Q4_K_M"
KINDS = ("F16", "Q8_0", "Q4_0", MIX)


def write_gguf(path: Path, module: Any, kind: str) -> None:
    """The file of a module of transformers on the meta device, in the types that `kind` (of KINDS) stands for.

    Tensors are made and written one by one. Norms are ones, and there is no tokenizer.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    config = module.config
    architecture = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    names = get_gguf_hf_weights_map(module, TensorProcessor())
    shapes = {name: tuple(module.state_dict()[of].shape) for name, of in names.items()}
    if config.tie_word_embeddings:
        shapes.pop("output.weight", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in _keys(config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"{architecture}.{key}", value
        )
    writer.add_tokenizer_model("none")
    types = {name: _type_of(name, shape, kind, config.num_hidden_layers) for name, shape in shapes.items()}
    factors = _frequency_factors(config)
    if factors is not None:  # before the others, as llama.cpp's converter writes them
        shapes = {"rope_freqs.weight": factors.shape, **shapes}
        types["rope_freqs.weight"] = "F32"
    for name, shape in shapes.items():
        of = gguf.GGMLQuantizationType[types[name]]
        block, size = gguf.GGML_QUANT_SIZES[of]
        num_bytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        is_factor = name == "rope_freqs.weight"
        writer.write_tensor_data(factors if is_factor else _numbers(generator, shape, types[name]))
    writer.close()


def _keys(config: Any) -> dict[str, int | float]:
    found: dict[str, int | float] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    rope = config.rope_parameters
    found["rope.freq_base"] = float((rope.get("full_attention") or rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        found["attention.sliding_window"] = config.sliding_window
    return found


def _frequency_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """What Llama 3.1 and later divide the rotary frequencies by, [pairs]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    base, pairs = config.rope_parameters["rope_theta"], np.arange(0, config.head_dim, 2)
    return (base ** (-pairs / config.head_dim) / scaled.numpy()).astype(np.float32)


def _type_of(name: str, shape: tuple[int, ...], kind: str, layers: int) -> str:
    """As llama.cpp's llama_tensor_get_type chooses (src/llama-quant.cpp)."""
    if len(shape) == 1:
        return "F32"
    wide = name in ("output.weight", "token_embd.weight")  # the embedding of a tied model is its head
    if kind != MIX and not (kind == "Q4_0" and wide):
        return kind
    if ".attn_v." in name or ".ffn_down." in name:
        layer = int(name.split(".")[1])
        wide = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    found = "Q6_K" if wide else "Q4_K"
    return found if shape[-1] % 256 == 0 else _FALLBACK[found]


def _numbers(generator: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    import gguf

    if kind == "F32":
        return np.ones(shape, np.float32)
    count = int(np.prod(shape))
    if kind == "F16":
        found = np.empty(count, np.float16)
        step = 1 << 24
        for start in range(0, count, step):
            found[start : start + step] = (
                generator.standard_normal(min(step, count - start), np.float32) * 0.02
            )
        return found.reshape(shape)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = np.frombuffer(generator.bytes(count // block * size), np.uint8).reshape(-1, size).copy()
    for place, scale in _SCALES[kind].items():
        numbers = generator.uniform(0.9, 1.1, (len(data), 1)).astype(np.float32) * scale
        data[:, place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], -1)
