"""Run a language model's own module: the truth that a program is held against. Knows nothing of splits or programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from doubleweave.sources.positions import first_position

# Rows of a cache, float32 [1, tokens, width], by value: "k_0" and "v_0" are those of the first attention.
Rows = Mapping[str, Tensor]


def source_logits(module: Any, token_ids: Tensor, cached: Rows) -> Tensor:
    """Logits float32 [T, vocab] of token_ids int64 [1, T], behind the rows of a cache.

    Without rows the module runs as in training: all tokens at once and no cache. Raises what the module raises.
    """
    start = next((rows.shape[1] for rows in cached.values()), 0)
    positions = torch.arange(start, start + token_ids.shape[1])[None] + first_position(module)
    past = {"use_cache": True, "past_key_values": _cache(module, cached)} if start else {"use_cache": False}
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.no_grad():
        logits: Tensor = module(input_ids=token_ids, position_ids=positions, **past).logits
        for (
            buffer,
            kept,
        ) in before:  # LongRoPE writes frequencies into a buffer, which the split reads as well
            buffer.copy_(kept)
    return logits[0].float()


def _cache(module: Any, cached: Rows) -> Any:
    """transformers' cache with these rows; its layers with a window keep what the window needs."""
    from transformers import DynamicCache

    with torch.no_grad():  # the number of heads of each layer is that of what the module itself caches
        seen = module(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    cache: Any = DynamicCache(config=module.config.get_text_config(decoder=True))
    for number, layer in enumerate(seen.layers):
        heads = layer.keys.shape[1]
        keys, values = (_by_head(cached[f"{letter}_{number}"], heads) for letter in "kv")
        cache.update(keys, values, number)
    return cache


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """[1, tokens, heads * width] -> [1, heads, tokens, width]."""
    return rows.view(1, rows.shape[1], heads, -1).transpose(1, 2)
