"""Load a GGUF file: its config, its weights in float32 under transformers' names, and its tokenizer.

What the file says beyond that is honoured or refused: keys in gguf_metadata.py and gguf_tokenizer.py, tensors in
gguf_tensors.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from doubleweave.errors import SourceError
from doubleweave.sources import gguf_rotary
from doubleweave.sources.gguf_audit import audit
from doubleweave.sources.gguf_file import GgufFile, check_types, read_gguf
from doubleweave.sources.gguf_metadata import config_of
from doubleweave.sources.gguf_tensors import GgufTensors
from doubleweave.sources.gguf_tokenizer import tokenizer_of
from doubleweave.sources.hugging_face import from_module, quiet
from doubleweave.sources.model import Model
from doubleweave.sources.streamed_module import streamed_module

# Architectures that files write in one word.
_UNJOINED = ("qwen2moe", "qwen3moe")


def load(path: Path) -> Model:
    """Load the file, and all parts of one in parts; raises SourceError for damage and for what cannot be honoured."""
    file = read_gguf(path)
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as supported

    # The list has names of transformers beside those of files (gpt_oss, gpt-oss).
    if file.architecture not in {*supported, *(name.replace("_", "-") for name in supported), *_UNJOINED}:
        raise SourceError(
            f"{path}: found architecture {file.architecture!r}, expected one of {', '.join(sorted(set(supported)))}"
        )
    check_types(file)
    with quiet():
        try:
            module = _module(file)
            text = tokenizer_of(file)
        except SourceError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise SourceError(
                f"{path}: transformers cannot load it ({type(error).__name__}: {reason}); use the model's Hugging Face "
                "folder"
            ) from error
        ends = list(text.eos_token_ids) if text is not None else []
        for config in (module.config, module.generation_config):
            config.eos_token_id = ends or None
        model = from_module(module.eval(), file.name, None if text is None else text.as_transformers())
    save = None if text is None else lambda folder: text.tokenizer.save(str(folder / "tokenizer.json"))
    return replace(model, save_tokenizer=save, audit=lambda: audit(file, module))


def _module(file: GgufFile) -> Any:
    from transformers import AutoModelForCausalLM

    makers: Any = AutoModelForCausalLM
    config = config_of(file)
    with torch.device("meta"):
        empty = makers.from_config(config)
    tensors = GgufTensors(file, config, empty)
    module = streamed_module(type(empty), config, tensors, lambda name, shape: False)
    if module is None:
        module = _whole(file, type(empty), config, tensors)
    gguf_rotary.apply_frequency_factors(file, module)
    return module


def _whole(file: GgufFile, kind: Any, config: Any, tensors: GgufTensors) -> Any:
    module, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    left = sorted(
        {*report["missing_keys"], *report["unexpected_keys"]}
        | {str(key) for key in report["mismatched_keys"]}
    )
    if left:
        raise SourceError(
            f"{file.path}: {left[0]} and {len(left) - 1} other weights cannot be loaded; use the model's Hugging Face "
            "folder"
        )
    return module
