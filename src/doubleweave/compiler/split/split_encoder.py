"""Split a language model's encoder: a function of the program beside the decoder, whose results all chunks read.

It knows nothing of attention or sessions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from doubleweave.compiler.graph.encoder_attention import encoder_attention
from doubleweave.compiler.policy import Dynamic
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.split_module import split_module
from doubleweave.errors import SplitError
from doubleweave.ir.split import ENCODED, ENCODER, Split
from doubleweave.sources.encoder_decoder import Decoder


class _Encoder(nn.Module):
    """From what an encoder takes to keys and values, [1, E, …] each, of every layer that attends to its rows."""

    def __init__(self, encoder: nn.Module, project: nn.Module) -> None:
        super().__init__()
        self.encoder, self.project = encoder, project

    def forward(self, encoder_input: Tensor) -> Any:
        return self.project(self.encoder(encoder_input, return_dict=True).last_hidden_state)


class _Caller(nn.Module):
    """Calls the encoder, so that it becomes a function with a name."""

    def __init__(self, encoder: _Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, encoder_input: Tensor) -> Any:
        return self.encoder(encoder_input)


def split_encoder(decoder: Decoder, project: nn.Module, most_rows: int) -> TorchSplit:
    """The encoder as the function ENCODER; `project` makes keys and values of its rows (encoded_rows.py).

    An encoder of token ids takes 1 to `most_rows`. Raises SplitError where it cannot be split.
    """
    module = _Caller(_Encoder(decoder.encoder, project)).eval()
    dims = {"encoder_input": {1: Dim(ENCODED, min=1, max=most_rows)}} if decoder.takes_tokens else None
    with encoder_attention(decoder.model):
        found = split_module(module, (decoder.encoder_input,), {}, dims, {ENCODER: Dynamic()})
    if found.states:
        raise SplitError(
            f"the encoder changes {', '.join(found.states)} as it runs: expected an encoder that keeps nothing; this "
            "architecture is not supported"
        )
    (function,) = found.torch_split.split.functions[1:]
    used = {call.segment for call in function.calls}
    segments = tuple(s for s in found.torch_split.split.segments if s.name in used)
    return replace(found.torch_split, split=Split(segments, (function,)))


def with_encoder(torch_split: TorchSplit, encoder: TorchSplit) -> TorchSplit:
    """A decoder's split with the function of its encoder."""
    main, more = torch_split.split, encoder.split
    return replace(
        torch_split,
        split=Split((*main.segments, *more.segments), (*main.functions, *more.functions)),
        graphs=torch_split.graphs | encoder.graphs,
        weights=torch_split.weights | encoder.weights,
    )


def encoded_example(decoder: Decoder, project: nn.Module, split: Split) -> dict[str, Tensor]:
    """What the encoder gives for the decoder's example, by value, for runs in eager torch."""
    names = [value.name for value in split.values if value.kind == "encoded"]
    with torch.no_grad():
        return dict(zip(names, project(decoder.rows), strict=True))
