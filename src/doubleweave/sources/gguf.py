"""Load a GGUF file: its config, its weights in float32 under transformers' names, and its tokenizer.

What the file says beyond that is honoured or refused: keys in gguf_metadata.py and gguf_tokenizer.py, tensors here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doubleweave.errors import SourceError
from doubleweave.sources import gguf_rotary
from doubleweave.sources.gguf_audit import audit
from doubleweave.sources.gguf_file import GgufFile, check_types, read_gguf
from doubleweave.sources.gguf_metadata import config_of
from doubleweave.sources.gguf_tokenizer import tokenizer_of
from doubleweave.sources.hugging_face import from_module, quiet
from doubleweave.sources.model import Model

# gguf-py's name of an architecture whose model type in transformers is another.
_NAMED_AS = {"mistral": "llama"}
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
    state = _state(file, config, empty)
    module, report = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=state,
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
    gguf_rotary.apply_frequency_factors(file, module)
    return module


def _state(file: GgufFile, config: Any, empty: torch.nn.Module) -> dict[str, Tensor]:
    """The weights by transformers' names; raises SourceError unless tensors and weights match one to one."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    makers: Any = TENSOR_PROCESSORS
    processor = makers.get(file.architecture, TensorProcessor)(config=config.to_dict())
    names: dict[str, str] = get_gguf_hf_weights_map(
        empty, processor, model_type=_NAMED_AS.get(config.model_type)
    )
    shapes = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    gathered: dict[str, Any] = {"tensors": {}, "config": {}}
    state: dict[str, Tensor] = gathered["tensors"]
    for name in file.tensors:
        if name in gguf_rotary.TENSORS:
            continue
        known = name in names or name.removesuffix(".weight") in names
        if not known:
            raise SourceError(
                f"{file.path}: found the tensor {name}, which {type(empty).__name__} has no weight for; use the "
                "model's Hugging Face folder"
            )
        made = processor.process(
            weights=file.weights(name), name=name, tensor_key_mapping=names, parsed_parameters=gathered
        )
        if made.name is not None:
            state[names[made.name]] = torch.from_numpy(np.copy(made.weights))
    _check_state(file, config, state, shapes)
    return state


def _check_state(
    file: GgufFile, config: Any, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> None:
    for name, value in state.items():
        if shapes.get(name) != tuple(value.shape):
            raise SourceError(
                f"{file.path}: {name} has the shape {list(value.shape)}, expected {list(shapes.get(name, ()))} from "
                "the file's keys; fetch the file again"
            )
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    missing = [name for name in shapes if name not in state and name not in tied]
    if missing:
        more = f" and {len(missing) - 5} others" if len(missing) > 5 else ""
        raise SourceError(
            f"{file.path}: has no tensors for {', '.join(missing[:5])}{more}; fetch the file, and all its parts, again"
        )
