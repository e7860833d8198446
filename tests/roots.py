"""One architecture for each thing that decoders do beside plain attention."""

from __future__ import annotations

import os

ROOTS = {
    "lfm2": "a convolution along the rows",
    "mamba2": "a state-space model, without attention",
    "qwen3_next": "linear attention, and experts",
    "qwen2_moe": "experts chosen by softmax, and one for all",
    "glm4_moe": "experts chosen by groups",
    "cohere": "rotary embedding of neighbours",
    "gpt_oss": "attention sinks",
    "bloom": "slopes by position (ALiBi)",
    "gptj": "attention written in the model",
    "deepseek_v3": "latent attention",
    "gemma3n_text": "caches shared between layers",
    "diffllama": "differential attention",
}
_NAMED = os.environ.get("ROOTS", "")
# Those that ROOTS names, all of them for "all"; none without it.
NAMED = tuple(ROOTS) if _NAMED == "all" else tuple(filter(None, _NAMED.split(",")))
