"""An encoder-decoder model (Whisper, Bart, T5) as what a program is made of: an encoder, and a decoder over its rows.

To everything that takes a causal language model the decoder is one: its encoder's rows are an argument that has a value
by default. Knows nothing of graphs or programs.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from doubleweave.errors import SourceError

EXAMPLE_ROWS = 29  # of an encoder that takes any number of tokens: unlike the other sizes of a model
# The names under which configs say how many rows an encoder takes.
_LENGTHS = ("max_source_positions", "max_position_embeddings", "n_positions")


def is_encoder_decoder(module: Any) -> bool:
    """Whether a transformers model has an encoder whose rows its decoder attends to."""
    return bool(getattr(module.config, "is_encoder_decoder", False)) and hasattr(module, "get_encoder")


def auto_class_of(config: Any) -> Any | None:
    """transformers' auto class of models with an encoder that has this config; None for any other config."""
    from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

    if not getattr(config, "is_encoder_decoder", False):
        return None
    autos: tuple[Any, ...] = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)
    return next((auto for auto in autos if type(config) in auto._model_mapping), None)


class Decoder(nn.Module):
    """The decoder of a transformers model, with the calling convention of a causal language model.

    `encoder_input` is an example of what the encoder takes, `rows` are the rows that it makes of it, float32
    [1, E, width]: those that `forward` attends to unless it is given others. `start_token_ids` are the tokens that a
    text begins with.
    """

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.input_name = str(model.main_input_name)
        self.takes_tokens = self.input_name == "input_ids"
        self.encoder_input = _example(model, name)
        self._takes_positions = "decoder_position_ids" in inspect.signature(model.forward).parameters
        with torch.no_grad():
            encoded = self.encoder(self.encoder_input, return_dict=True)
        self._output_class: Any = type(encoded)
        self.rows: Tensor = encoded.last_hidden_state

    @property
    def encoder(self) -> Any:
        return self.model.get_encoder()

    @property
    def start_token_ids(self) -> tuple[int, ...]:
        for part in (getattr(self.model, "generation_config", None), self.config):
            found = getattr(part, "decoder_start_token_id", None)
            if isinstance(found, int):
                return (found,)
        return ()

    def most_rows(self, max_context: int) -> int:
        """How many rows of the encoder the decoder attends to at most; `max_context` where the config does not say."""
        found = (getattr(self.config, name, None) for name in _LENGTHS)
        return next((number for number in found if isinstance(number, int) and number > 0), max_context)

    def encode(self, encoder_input: Tensor) -> Tensor:
        """The encoder's rows, float32 [1, E, width]."""
        with torch.no_grad():
            rows: Tensor = self.encoder(encoder_input, return_dict=True).last_hidden_state
        return rows

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        past_key_values: Any = None,
        encoder_rows: Tensor | None = None,
    ) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        rows = self.rows if encoder_rows is None else encoder_rows
        given: dict[str, Any] = {"use_cache": use_cache}
        if self._takes_positions and position_ids is not None:
            given["decoder_position_ids"] = position_ids
        if past_key_values is not None:
            # The encoder's keys and values are worked out anew.
            given["past_key_values"] = EncoderDecoderCache(past_key_values, DynamicCache())
        encoded = self._output_class(last_hidden_state=rows)
        return self.model(decoder_input_ids=input_ids, encoder_outputs=encoded, **given)

    def get_input_embeddings(self) -> Any:
        return self.model.get_decoder().get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)


def _example(model: Any, name: str) -> Tensor:
    """What the encoder takes, of the shape that it takes; raises SourceError where that is not known."""
    if model.main_input_name == "input_ids":
        return torch.randint(
            3, model.config.vocab_size, (1, EXAMPLE_ROWS), generator=torch.Generator().manual_seed(20261)
        )
    channels = getattr(model.config, "num_mel_bins", None)
    rows = getattr(model.config, "max_source_positions", None)
    if isinstance(channels, int) and isinstance(rows, int):
        strides = (one.stride[0] for one in model.get_encoder().modules() if isinstance(one, nn.Conv1d))
        frames = rows * math.prod(strides)
        example = torch.randn(1, channels, frames, generator=torch.Generator().manual_seed(20261))
        try:
            with torch.no_grad():
                made = model.get_encoder()(example, return_dict=True).last_hidden_state
        except Exception:  # it takes another form of sound
            made = None
        if made is not None and made.shape[1] == rows:
            return example
    raise SourceError(
        f"{name}: its encoder takes {model.main_input_name}, and the config does not say of which shape: expected "
        "token ids, or num_mel_bins channels that make max_source_positions rows; this architecture is not supported"
    )
