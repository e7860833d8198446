"""A GGUF file's rotary embedding as transformers' rope_parameters, and its frequency factors put into a module.

What the keys mean is llama.cpp's reading of them (src/llama-model.cpp, src/llama-context.cpp; ggml's rope).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from doubleweave.errors import SourceError
from doubleweave.sources.gguf_file import GgufFile

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQS, LONG, SHORT)
KEYS = (
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",  # says how the model was made
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
_BASE = 10000.0  # where no key names it
# Models of transformers that turn a part of each head only.
_PARTIAL = ("phi3", "stablelm", "nemotron", "minimax_m2")
_BY_LAYER = ("gemma3_text",)  # one rotary embedding for layers with a window, another for those without
WITHOUT = ("gpt2", "bloom", "mamba", "t5", "umt5")


def rope_parameters(file: GgufFile, model_type: str, head_dim: int) -> dict[str, Any]:
    """What transformers' config takes as `rope_parameters`; raises SourceError for what its model cannot do."""
    found: dict[str, Any] = {"rope_theta": float(file.get("rope.freq_base", _BASE)), **_scaling(file)}
    dims = int(file.get("rope.dimension_count", head_dim))
    if dims != head_dim and model_type not in _PARTIAL:
        raise SourceError(
            f"{file.path}: found {file.architecture}.rope.dimension_count {dims}, expected {head_dim}, a whole head; "
            "use the model's Hugging Face folder"
        )
    if model_type in _PARTIAL:
        found["partial_rotary_factor"] = dims / head_dim
    local = file.get("rope.freq_base_swa")
    if model_type in _BY_LAYER:
        own = {"rope_type": "default", "rope_theta": float(_BASE if local is None else local)}
        return {"full_attention": found, "sliding_attention": own}
    if local is not None and float(local) != found["rope_theta"]:
        raise SourceError(
            f"{file.path}: found {file.architecture}.rope.freq_base_swa {local}, expected none: its layers share one "
            "rotary embedding; use the model's Hugging Face folder"
        )
    return found


def _scaling(file: GgufFile) -> dict[str, Any]:
    key = f"{file.architecture}.rope.scaling"
    # Files from before the types had names scale linearly.
    kind = str(file.get("rope.scaling.type", "linear"))
    factor = float(file.get("rope.scaling.factor", file.get("rope.scale_linear", 0.0))) or 1.0
    attention = float(file.get("rope.scaling.attn_factor", file.get("rope.scaling.yarn_attn_factor", 1.0)))
    context = int(file.get("rope.scaling.original_context_length", 0)) or int(file.get("context_length", 0))
    _refuse_unused(file, kind)
    if LONG in file.tensors or SHORT in file.tensors or kind == "longrope":
        return _longrope(file, kind, attention, context)
    if kind == "yarn":
        # llama.cpp works with 0.1 ln(factor) + 1 as transformers does, times the file's own factor.
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": context,
            "attention_factor": attention * (0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0),
            "beta_fast": float(file.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(file.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    if kind not in ("none", "linear"):
        raise SourceError(
            f"{file.path}: found {key}.type {kind!r}, expected none, linear, yarn or longrope; use the model's Hugging "
            "Face folder"
        )
    if attention != 1.0:
        raise SourceError(
            f"{file.path}: found {key}.attn_factor {attention} with the type {kind!r}, expected 1; use the model's "
            "Hugging Face folder"
        )
    if kind == "none" or factor == 1.0:
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor}


def _refuse_unused(file: GgufFile, kind: str) -> None:
    """SourceError for values of keys that transformers' YaRN does not have, or that belong to another type."""
    yarn = kind == "yarn"
    for name, usual in (("ext_factor", 1.0 if yarn else 0.0), ("beta_fast", 32.0), ("beta_slow", 1.0)):
        found = float(file.get(f"rope.scaling.yarn_{name}", usual))
        if found != usual and found >= 0 and not (yarn and name.startswith("beta")):
            raise SourceError(
                f"{file.path}: found {file.architecture}.rope.scaling.yarn_{name} {found} with the type {kind!r}, "
                f"expected {usual}; use the model's Hugging Face folder"
            )


def _longrope(file: GgufFile, kind: str, attention: float, context: int) -> dict[str, Any]:
    missing = [name for name in (LONG, SHORT) if name not in file.tensors]
    if missing or kind not in ("longrope", "linear", "none"):
        raise SourceError(
            f"{file.path}: found {file.architecture}.rope.scaling.type {kind!r} "
            f"{f'without the tensor {missing[0]}' if missing else f'with the tensor {LONG}'}, expected longrope with "
            f"{LONG} and {SHORT}; fetch the file again"
        )
    longest = int(file.get("context_length", context))
    return {
        "rope_type": "longrope",
        "factor": longest / context,
        "original_max_position_embeddings": context,
        "attention_factor": attention,
        "long_factor": file.weights(LONG).reshape(-1).tolist(),
        "short_factor": file.weights(SHORT).reshape(-1).tolist(),
    }


def apply_frequency_factors(file: GgufFile, module: torch.nn.Module) -> None:
    """Divide the module's inverse frequencies by the tensor rope_freqs.weight, which Llama 3.1 and later have."""
    if FREQS not in file.tensors:
        return
    factors = torch.from_numpy(file.weights(FREQS).reshape(-1).copy())
    found = [
        buffer
        for name, buffer in module.named_buffers()
        if name.rsplit(".", 1)[-1] in ("inv_freq", "original_inv_freq")
    ]
    if not found or any(buffer.shape != factors.shape for buffer in found):
        expected = f"{len(found[0])} factors" if found else "none for this model"
        raise SourceError(
            f"{file.path}: found {FREQS} with {len(factors)} factors, expected {expected}; fetch the file again"
        )
    with torch.no_grad():
        for buffer in found:
            buffer.div_(factors)
