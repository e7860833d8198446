"""Load a folder in Hugging Face's layout (config.json, safetensors, tokenizer) with transformers."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from doubleweave.errors import SourceError
from doubleweave.sources.model import Model


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal, where our own progress is shown."""
    from transformers.utils import logging as untyped

    transformers_logging: Any = untyped
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what torch says of torchao when transformers imports it
    try:
        # The bar of the GGUF reader has no switch.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def load(path: Path) -> Model:
    """Load the folder; raises SourceError for a missing config or weights transformers cannot read."""
    if not (path / "config.json").exists():
        raise SourceError(f"{path}: has no config.json; expected a Hugging Face model folder")
    return load_pretrained(path, name=path.resolve().name)


def load_pretrained(path: Path, name: str, **kwargs: Any) -> Model:
    """`AutoModelForCausalLM.from_pretrained(path, **kwargs)` and its tokenizer as a Model."""
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            module: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=torch.float32,
                attn_implementation="eager",
                # SOURCE is a folder: nothing is fetched.
                local_files_only=True,
                **kwargs,
            )
        except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
            raise SourceError(f"{path}: transformers cannot load it: {_first_line(error)}") from error
        except Exception as error:  # safetensors and gguf raise types of their own
            raise SourceError(
                f"{path}: the weights cannot be read ({type(error).__name__}: {_first_line(error)}); "
                "fetch the file again"
            ) from error
        tokenizer = _load_tokenizer(path, **kwargs)
    if tokenizer is not None:
        _check_vocabulary(path, tokenizer, int(module.config.vocab_size))
    return from_module(module.eval(), name, tokenizer)


def from_module(module: Any, name: str, tokenizer: Any | None) -> Model:
    """A Model around a transformers module that is already in memory."""
    config = module.config
    # The three may name other tokens: a chat model's end of turn is often in one of them alone.
    eos: list[int] = []
    for found in (
        getattr(module.generation_config, "eos_token_id", None),
        config.eos_token_id,
        getattr(tokenizer, "eos_token_id", None),
    ):
        eos += found if isinstance(found, list) else [found] if isinstance(found, int) else []
    return Model(
        name=name,
        module=module,
        max_context=int(config.max_position_embeddings),
        vocab_size=int(config.vocab_size),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        save_tokenizer=None
        if tokenizer is None
        else lambda folder: tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json")),
        chat_template=getattr(tokenizer, "chat_template", None),
        special_tokens={
            key: str(value)
            for key, value in getattr(tokenizer, "special_tokens_map", {}).items()
            if isinstance(value, str)
        },
    )


def _load_tokenizer(path: Path, **kwargs: Any) -> Any | None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **kwargs)
    except Exception:
        return None
    return tokenizer if hasattr(tokenizer, "backend_tokenizer") else None


def _check_vocabulary(path: Path, tokenizer: Any, vocab_size: int) -> None:
    """Raise SourceError for a tokenizer of another model, whose ids the embedding would not have."""
    # Added tokens may lie beyond the vocabulary, and a vocabulary may be padded beyond the tokens.
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    if size > vocab_size:
        raise SourceError(
            f"{path}: the tokenizer has {size} tokens, but the model has {vocab_size}; put the model's own there"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
