"""The record that every loader returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class Model:
    """A causal language model, with its tokenizer and the settings that generation needs.

    `module` is float32, in eval mode, in Hugging Face's calling convention; its weights may stay in their files
    (file_weights.py). `save_tokenizer` writes tokenizer.json into a folder (None: the source has no tokenizer).
    `special_tokens` are the texts a chat template may name (bos_token, eos_token, …). `max_context` is None where the
    source does not say what the model was trained for. `audit` reads the source again, by other means than the
    loader, and says in a sentence how `module` differs from it, "" where it does not. `kinds_of_tokens` says how the
    model that this is the text part of is told tokens of an image from those of a text, "" where it is not.
    """

    name: str
    module: nn.Module
    max_context: int | None
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    save_tokenizer: Callable[[Path], None] | None
    chat_template: str | dict[str, str] | None
    special_tokens: dict[str, str]
    audit: Callable[[], str] = lambda: ""
    kinds_of_tokens: str = ""
