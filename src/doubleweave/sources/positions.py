"""At which position a language model's first token is. Knows nothing of graphs or programs."""

from __future__ import annotations

from typing import Any

from torch import nn


def first_position(module: Any) -> int:
    """0, or what RoBERTa counts from: the row behind the padding's in a table of learned positions."""
    rows = getattr(module.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tables = (found for found in module.modules() if isinstance(found, nn.Embedding))
    for table in tables:
        is_of_positions = table.num_embeddings == rows and table is not module.get_input_embeddings()
        if is_of_positions and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0
