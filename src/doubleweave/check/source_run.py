"""Run a language model's own module: the truth that a program is held against. Knows nothing of splits or programs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from doubleweave.compiler.graph.states import states_in, takes_cache_as
from doubleweave.sources.positions import first_position

# Rows of a cache, float32 [1, tokens, width], by value: "k_0" and "v_0" are those of the first attention. And states,
# [1, …], by their names.
Rows = Mapping[str, Tensor]


def source_logits(module: Any, token_ids: Tensor, cached: Rows) -> Tensor:
    """Logits float32 [T, vocab] of token_ids int64 [1, T], behind the rows and states of a cache.

    Without them the module runs as in training: all tokens at once and no cache. Raises what the module raises.
    """
    start = next((rows.shape[1] for name, rows in cached.items() if name.startswith("k_")), 0)
    past: dict[str, Any] = (
        {"use_cache": True, takes_cache_as(module): _cache(module, cached)}
        if cached
        else {"use_cache": False}
    )
    if "position_ids" in inspect.signature(module.forward).parameters:
        positions = torch.arange(start, start + token_ids.shape[1])[None]
        past["position_ids"] = positions + first_position(module)
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with torch.no_grad():
        logits: Tensor = module(input_ids=token_ids, **past).logits
        # LongRoPE writes frequencies into a buffer, which the split reads as well.
        for buffer, kept in before:
            buffer.copy_(kept)
    return logits[0].float()


def _cache(module: Any, cached: Rows) -> Any:
    """transformers' cache with these rows and states; its layers with a window keep what the window needs."""
    from transformers import DynamicCache

    config = module.config.get_text_config(decoder=True)
    seen: Any = DynamicCache(config=config)
    cache: Any = DynamicCache(config=config)
    with torch.no_grad():  # the number of heads of each layer is that of what the module itself caches
        module(
            input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True, **{takes_cache_as(module): seen}
        )
    attending = [n for n, layer in enumerate(seen.layers) if isinstance(getattr(layer, "keys", None), Tensor)]
    for number, layer in enumerate(attending):
        heads = seen.layers[layer].keys.shape[1]
        keys, values = (_by_head(cached[f"{letter}_{number}"], heads) for letter in "kv")
        cache.update(keys, values, layer)
    for key, _ in states_in(seen):
        held: Any = cache.layers[key.layer]
        state = cached[key.name]
        held.lazy_initialization(**{f"{key.kind}_states": state, "state_idx": key.number})
        getattr(held, f"{key.kind}_states")[key.number].copy_(state)
        held.has_previous_state[key.number] = True
    return cache


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """[1, tokens, heads * width] -> [1, heads, tokens, width]."""
    return rows.view(1, rows.shape[1], heads, -1).transpose(1, 2)
