"""What transformers' mask interface is to return for the attention operator: nothing for masks that the operator has.

transformers describes a mask by a function of a query's and a key's position. The operator is causal by itself, and
knows its window from the attention interface; a mask would be an input of every segment that attends. Any other mask is
made in plain operators, and understood from the graph (written_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_Mask = Callable[[Any, Any, Any, Any], Any]


def mask_of(*args: Any, mask_function: _Mask, local_size: int | None = None, **given: Any) -> Tensor | None:
    """transformers' interface for masks: None for a causal mask, all or within a window, else a float32 mask.

    `local_size` is the window, or the block of chunked attention. None for attention to all rows of an encoder, too,
    which are another number than the queries.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask

    lengths = {str(given.get(name)) for name in ("q_length", "kv_length")}
    if mask_function is bidirectional_mask_function and len(lengths) == 2:
        return None
    if mask_function is causal_mask_function:
        return None
    if local_size is not None:
        # What is traced has no numbers; how torch traces is a matter of each thread.
        with ThreadPoolExecutor(1) as other:
            if other.submit(_is_window, mask_function, local_size).result():
                return None
    make: Callable[..., Tensor | None] = eager_mask
    return make(*args, mask_function=mask_function, **given)


def chosen_keys(index: Tensor, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """A mask that hides all keys but those that an index attention chose for each query, and what `mask` hides.

    index [B, T, chosen] of keys, query [B, H, T, D], key [B, K, S, D], mask [B, 1, T, S] or None -> the same, float32.
    """
    shape = (query.shape[0], query.shape[2], key.shape[2])
    seen = torch.zeros(shape, dtype=torch.bool).scatter(-1, index.long(), True).unsqueeze(1)
    least = torch.finfo(torch.float32).min
    if mask is None:
        return torch.zeros(seen.shape).masked_fill(~seen, least)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape).masked_fill(~(mask & seen), least)
    return mask.masked_fill(~seen, least)


def causal_mask(query: Tensor, key: Tensor, window: int) -> Tensor:
    """The float32 mask [1, 1, T, S] that hides later keys, and those before a window (0: none)."""
    places = torch.arange(query.shape[2]).unsqueeze(1), torch.arange(key.shape[2])
    hidden = places[1] > places[0]
    if window:
        hidden = hidden | (places[1] <= places[0] - window)
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


def _is_window(mask_function: _Mask, size: int) -> bool:
    """Whether a query sees its own key and the size - 1 keys before it."""
    query = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size + 3])[:, None]
    key = torch.arange(2 * size + 8)[None]
    try:
        found = mask_function(torch.tensor(0), torch.tensor(0), query, key)
        return torch.equal(found, (key <= query) & (key > query - size))
    except Exception:  # it holds tensors that are traced, as the function of chunked attention does
        return False
