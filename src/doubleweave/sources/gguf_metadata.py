"""The table of a GGUF file's keys that change a model, and the config of transformers' that honours them.

A key that nobody reads is refused by its name, unless its value is the one that changes nothing. Which keys there are
and what they mean: gguf-py's constants (ggml-org/llama.cpp, gguf-py/gguf/constants.py) and llama.cpp's reading of them.
"""

from __future__ import annotations

from typing import Any

from doubleweave.errors import SourceError
from doubleweave.sources import gguf_rotary
from doubleweave.sources.gguf_file import GgufFile

# By key: names that configs have for it; the first that a model's config has is set.
FIELDS: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "shortconv.l_cache": ("conv_L_cache",),
}
# By key: the values that change nothing. Of any other key those are 0, false and the empty ones.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),  # softmax
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
_REQUIRED = ("context_length", "embedding_length", "block_count", "attention.head_count")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_WINDOWED = ("mistral", "phi3", "gemma2", "gemma3_text", "starcoder2", "gpt_oss")
_SCALED_BY_QUERY = ("gemma2", "gemma3_text")
_LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B models
_ELSEWHERE = (
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window_pattern",
    *gguf_rotary.KEYS,
)


def config_of(file: GgufFile) -> Any:
    """transformers' config of the model; raises SourceError, with the key, for what it cannot say."""
    from transformers import CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    _check_kind(file)
    untyped: Any = load_gguf_checkpoint
    known: dict[str, Any] = dict(untyped(str(file.path), return_tensors=False)["config"])
    if file.architecture == "llama":  # whatever the file calls itself
        known["model_type"] = "mistral" if _window(file) else "llama"
    model_type = str(known.pop("model_type"))
    usual = CONFIG_MAPPING[model_type]()
    values = _values(file)
    fields = {key: name for key in values if (name := _field(usual, key)) is not None}
    _refuse_unread(file, values, fields, model_type)
    if model_type not in _WINDOWED:
        fields.pop("attention.sliding_window", None)
    known.update({name: values[key] for key, name in fields.items()})
    known.pop("rope_theta", None)
    known["pad_token_id"] = None  # a config's own may lie beyond the vocabulary, and no number depends on it
    known.update(_from_tensors(file, usual))
    known.update(_attention(file, values, usual, model_type))
    config = CONFIG_MAPPING[model_type](**known)
    for key, name in fields.items():
        if getattr(config, name) != values[key]:
            raise SourceError(
                f"{file.path}: found {file.architecture}.{key} {values[key]}, but transformers' {model_type} makes it "
                f"{getattr(config, name)}; use the model's Hugging Face folder"
            )
    return config


def _check_kind(file: GgufFile) -> None:
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise SourceError(
            f"{file.path}: found general.type {kind!r}, expected 'model'; use the model's own file"
        )
    foreign = next((key for key in file.metadata if key.startswith(("adapter.", "clip."))), None)
    if foreign is not None:
        raise SourceError(
            f"{file.path}: found {foreign}, expected a language model; use the model's own file"
        )
    absent = [key for key in _REQUIRED if file.get(key) is None]
    if all(file.get(key) is None for key in _EPSILONS):
        absent.append(_EPSILONS[0])
    if absent:
        raise SourceError(
            f"{file.path}: has no {', '.join(f'{file.architecture}.{key}' for key in absent)}; fetch the file again"
        )


def _values(file: GgufFile) -> dict[str, Any]:
    """The architecture's keys and values; a value for each layer that is the same for all counts once."""
    prefix = f"{file.architecture}."
    found = {}
    for key, value in file.metadata.items():
        if key.startswith(prefix):
            several = isinstance(value, list) and "pattern" not in key and len(set(value)) == 1
            found[key.removeprefix(prefix)] = value[0] if several else value
    return found


def _field(usual: Any, key: str) -> str | None:
    return next((name for name in FIELDS.get(key, ()) if hasattr(usual, name)), None)


def _refuse_unread(file: GgufFile, values: dict[str, Any], fields: dict[str, str], model_type: str) -> None:
    for key, value in values.items():
        read = key in fields or key in _ELSEWHERE
        if key == "attention.sliding_window":
            read = model_type in _WINDOWED or not _window(file)
        elif key == "attention.scale":
            read = model_type in _SCALED_BY_QUERY
        elif key == "use_parallel_residual":  # the tensors say it, see _from_tensors
            read = model_type == "stablelm"
        elif key.startswith("rope.") and model_type in gguf_rotary.WITHOUT:
            read = False
        if isinstance(value, list) and key != "attention.sliding_window_pattern":
            read = False
        if read or (value in NEUTRAL[key] if key in NEUTRAL else not value):
            continue
        raise SourceError(
            f"{file.path}: found {file.architecture}.{key} {_shown(value)}, which is not read for this architecture; "
            "use the model's Hugging Face folder"
        )


def _from_tensors(file: GgufFile, usual: Any) -> dict[str, Any]:
    """What the presence of tensors says of the model."""
    names = file.tensors
    found: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in names}
    for field, tensor in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if hasattr(usual, field):
            found[field] = tensor in names
    if hasattr(usual, "use_qkv_bias"):
        found["use_qkv_bias"] = "blk.0.attn_q.bias" in names
        found["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in names
    if hasattr(usual, "qk_layernorm"):
        found["qk_layernorm"] = "blk.0.attn_q_norm.weight" in names
    return found


def _attention(file: GgufFile, values: dict[str, Any], usual: Any, model_type: str) -> dict[str, Any]:
    """Heads, windows, scales and rotary embedding, with llama.cpp's defaults where the file names none."""
    found: dict[str, Any] = {}
    heads, hidden, layers = (
        _one(values["attention.head_count"]),
        values["embedding_length"],
        values["block_count"],
    )
    head_dim = int(values.get("attention.key_length", hidden // heads))
    if values.get("attention.value_length", head_dim) != head_dim:
        raise SourceError(
            f"{file.path}: found {file.architecture}.attention.value_length {values['attention.value_length']}, "
            f"expected {head_dim} as attention.key_length; use the model's Hugging Face folder"
        )
    if "attention.head_count_kv" not in values and hasattr(usual, "num_key_value_heads"):
        found["num_key_value_heads"] = heads
    # Models read it though their configs may not declare it; of one that does not, the tensors' shapes are refused.
    if hasattr(usual, "head_dim") or head_dim != hidden // heads:
        found["head_dim"] = head_dim
    if model_type in _SCALED_BY_QUERY:
        largest = layers == _LARGEST_GEMMA[model_type]
        usual_scale = (hidden // heads if largest else head_dim) ** -0.5
        found["query_pre_attn_scalar"] = _query_scalar(
            file, float(values.get("attention.scale") or usual_scale)
        )
    pattern = values.get("attention.sliding_window_pattern")
    if pattern is not None and (_window(file) or pattern not in (0, 1)):
        found["layer_types"] = _layer_types(file, pattern, layers, usual)
    if model_type not in gguf_rotary.WITHOUT:
        found["rope_parameters"] = gguf_rotary.rope_parameters(file, model_type, head_dim)
    return found


def _query_scalar(file: GgufFile, scale: float) -> int:
    """The whole number whose square root divides attention's scores."""
    number = round(scale**-2)
    if number < 1 or abs(number**-0.5 - scale) > 1e-4 * scale:
        raise SourceError(
            f"{file.path}: found {file.architecture}.attention.scale {scale}, expected 1 / √n of a whole number n; use "
            "the model's Hugging Face folder"
        )
    return number


def _layer_types(file: GgufFile, pattern: Any, layers: int, usual: Any) -> list[str]:
    if not hasattr(usual, "layer_types") or (isinstance(pattern, list) and len(pattern) < layers):
        raise SourceError(
            f"{file.path}: found {file.architecture}.attention.sliding_window_pattern {_shown(pattern)}, which is not "
            "read for this architecture; use the model's Hugging Face folder"
        )
    # A number n: every nth layer sees the whole text. A list says of each layer whether it has the window.
    with_window = pattern if isinstance(pattern, list) else [(n + 1) % pattern != 0 for n in range(layers)]
    return ["sliding_attention" if flag else "full_attention" for flag in with_window[:layers]]


def _window(file: GgufFile) -> int:
    """The sliding window, 0 where it is as wide as the context."""
    window = file.get("attention.sliding_window") or 0
    return int(window) if not isinstance(window, list) and window < int(file.get("context_length")) else 0


def _one(value: Any) -> int:
    return int(max(value) if isinstance(value, list) else value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
