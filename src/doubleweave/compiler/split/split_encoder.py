"""Split a language model's encoder: a function of the program beside the decoder, whose results all chunks read.

It knows nothing of attention or sessions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from doubleweave.compiler.graph.encoder_attention import encoder_attention
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.split_module import split_module
from doubleweave.errors import SplitError
from doubleweave.ir.split import ENCODED, Split
from doubleweave.sources.encoder_decoder import Decoder


class _Encoder(nn.Module):
    """From what an encoder takes to keys and values, [1, E, …] each, of every layer that attends to its rows."""

    def __init__(self, encoder: nn.Module, project: nn.Module) -> None:
        super().__init__()
        self.encoder, self.project = encoder, project

    def forward(self, encoder_input: Tensor) -> Any:
        return self.project(self.encoder(encoder_input, return_dict=True).last_hidden_state)


def split_encoder(decoder: Decoder, project: nn.Module, most_rows: int) -> TorchSplit:
    """The split of the encoder by itself; `project` makes keys and values of its rows (encoded_rows.py).

    An encoder of token ids takes 1 to `most_rows`. Raises SplitError where it cannot be split.
    """
    module = _Encoder(decoder.encoder, project).eval()
    dims = {"encoder_input": {1: Dim(ENCODED, min=1, max=most_rows)}} if decoder.takes_tokens else None
    with encoder_attention(decoder.model):
        found = split_module(module, (decoder.encoder_input,), {}, dims, {})
    if found.states:
        raise SplitError(
            f"the encoder changes {', '.join(found.states)} as it runs: expected an encoder that keeps nothing; this "
            "architecture is not supported"
        )
    return found.torch_split


def encoded_example(decoder: Decoder, project: nn.Module, split: Split) -> dict[str, Tensor]:
    """What the encoder gives for the decoder's example, by value, for runs in eager torch."""
    names = [value.name for value in split.values if value.kind == "encoded"]
    with torch.no_grad():
        return dict(zip(names, project(decoder.rows), strict=True))
