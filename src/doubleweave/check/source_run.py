"""Run a language model's own module: the truth that a program is held against. Knows nothing of splits or programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def source_logits(module: Any, token_ids: Tensor, cached: int) -> Tensor:
    """Logits float32 [T, vocab] of token_ids int64 [1, T], behind `cached` tokens whose keys and values are zero.

    Without cached tokens the module runs as in training: all rows at once and no cache. Raises what the module raises.
    """
    positions = torch.arange(cached, cached + token_ids.shape[1])[None]
    past = {"use_cache": True, "past_key_values": _zeros(module, cached)} if cached else {"use_cache": False}
    with torch.no_grad():
        logits: Tensor = module(input_ids=token_ids, position_ids=positions, **past).logits
    return logits[0].float()


def _zeros(module: Any, cached: int) -> Any:
    """A cache of zeros; its layers with a window keep what the window needs."""
    from transformers import DynamicCache

    with torch.no_grad():  # the shapes of a layer's rows are what the module itself caches
        seen = module(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    cache: Any = DynamicCache(config=module.config.get_text_config(decoder=True))
    for number, layer in enumerate(seen.layers):
        keys, values = (
            rows.new_zeros(1, rows.shape[1], cached, rows.shape[3]) for rows in (layer.keys, layer.values)
        )
        cache.update(keys, values, number)
    return cache
