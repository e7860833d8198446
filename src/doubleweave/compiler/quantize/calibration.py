"""The text that quantization is calibrated on, as chunks of token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from doubleweave.compiler.quantize.channels import Place
from doubleweave.errors import InputError
from doubleweave.texts import calibration_text

MOST_TOKENS = 1024
# How large each channel's numbers become shows in few: with four times as many, logits come no nearer to float32.
FIRST_TOKENS = 256
PACKAGE_TEXT = "the package's text"
MOST_CHUNKS = 128  # token by token, a thousand runs of the model in eager torch take longer than compiling it


@dataclass(frozen=True)
class Calibration:
    """The texts that a model is calibrated on, as chunks of `size` tokens; the file `tokenizer` may be missing.

    `importance` is what was found on the first: the mean square of what each column of a weight multiplies, [K]. `used`
    says which texts something was fitted to.
    """

    tokenizer: Path
    size: int
    vocab_size: int
    importance: Mapping[Place, Tensor] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)

    def chunks(self, text: str | Path | None = None) -> list[Tensor]:
        """Token ids, int64 [1, size] each, at most `MOST_TOKENS` in all, in at most `MOST_CHUNKS`.

        `text` is a text file, or a .json file with a list of token ids; None takes the text that comes with the
        package. Raises InputError where it cannot be read or is shorter than one chunk.
        """
        name, size = str(text or "the default calibration text"), self.size
        ids = _token_ids(name, text, self.tokenizer)
        if len(ids) < size:
            raise InputError(f"{name}: found {len(ids)} tokens, expected at least {size}, one chunk")
        if wrong := [token for token in ids if not 0 <= token < self.vocab_size]:
            raise InputError(
                f"{name}: found token {wrong[0]}, expected 0 to {self.vocab_size - 1}, the model's vocabulary"
            )
        number = min(min(len(ids), max(MOST_TOKENS, size)) // size, MOST_CHUNKS)
        self.used.append(f"{number * size:,} tokens of {Path(text).name if text else PACKAGE_TEXT}")
        return list(torch.split(torch.tensor([ids[: number * size]]), size, dim=1))

    def first_tokens(self, most: int) -> list[Tensor]:
        """The beginning of the package's text as one chunk, of at most so many tokens; none without a tokenizer."""
        if not self.tokenizer.exists():
            return []
        ids = [token for token in text_tokens(self.tokenizer) if token < self.vocab_size]
        return [torch.tensor([ids[: min(most, FIRST_TOKENS)]])] if ids else []


def _token_ids(name: str, path: str | Path | None, tokenizer: Path) -> list[int]:
    try:
        text = calibration_text() if path is None else Path(path).read_text()
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
    return _encoded(calibration_text(), tokenizer)


def _encoded(text: str, tokenizer: Path) -> list[int]:
    import tokenizers

    return list(tokenizers.Tokenizer.from_file(str(tokenizer)).encode(text).ids)
