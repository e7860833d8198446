"""The text that quantization is calibrated on, as chunks of token ids."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from doubleweave.errors import InputError

MOST_TOKENS = 1024
MOST_CHUNKS = 128  # token by token, a thousand runs of the model in eager torch take longer than compiling it


def calibration_chunks(text: str | Path | None, tokenizer: Path, size: int, vocab_size: int) -> list[Tensor]:
    """Chunks of token ids, int64 [1, size] each, at most `MOST_TOKENS` in all, in at most `MOST_CHUNKS`.

    `text` is a text file, or a .json file with a list of token ids; None takes the text that comes with the package.
    Raises InputError where it cannot be read or is shorter than one chunk.
    """
    name = str(text or "the default calibration text")
    ids = _token_ids(name, text, tokenizer)
    if len(ids) < size:
        raise InputError(f"{name}: found {len(ids)} tokens, expected at least {size}, one chunk")
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise InputError(
            f"{name}: found token {wrong[0]}, expected 0 to {vocab_size - 1}, the model's vocabulary"
        )
    number = min(min(len(ids), max(MOST_TOKENS, size)) // size, MOST_CHUNKS)
    return list(torch.split(torch.tensor([ids[: number * size]]), size, dim=1))


def _token_ids(name: str, path: str | Path | None, tokenizer: Path) -> list[int]:
    try:
        file = files("doubleweave") / "calibration.txt" if path is None else Path(path)
        text = file.read_text()
        if name.endswith(".json"):
            return [int(token) for token in json.loads(text)]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"calibrate: {name} cannot be read as text or a JSON list of token ids ({error})"
        ) from None
    if not tokenizer.exists():
        raise InputError(
            "calibrate: the model has no tokenizer; give token ids, --calibrate FILE.json with a list of integers"
        )
    return _encoded(text, tokenizer)


def text_tokens(tokenizer: Path) -> list[int]:
    """The token ids of the text that comes with the package."""
    return _encoded(files("doubleweave").joinpath("calibration.txt").read_text(), tokenizer)


def _encoded(text: str, tokenizer: Path) -> list[int]:
    import tokenizers

    return list(tokenizers.Tokenizer.from_file(str(tokenizer)).encode(text).ids)
