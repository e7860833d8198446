"""The attention of an encoder as our operator: every row sees every row, and no product of rows by rows is kept.

This module knows nothing of segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doubleweave.compiler.graph.ops import CROSS
from doubleweave.errors import SplitError

_NAME = "doubleweave_encoder"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, E, D], key and value [B, K, E, D] -> [B, E, H, D]."""
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    if kwargs.get("s_aux") is not None:
        raise SplitError(
            f"{type(module).__name__} of the encoder has attention sinks: expected queries, keys, values, a mask, a "
            "scale, a soft cap or a bias by position; this architecture is not supported"
        )
    added = [one for one in (attention_mask, position_bias) if one is not None]
    if added:
        from transformers.integrations.sdpa_attention import repeat_kv

        groups = query.shape[1] // key.shape[1]
        scores = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3)) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(sum(added, scores), dim=-1)
        return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2), None
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    q, k, v = (x.transpose(1, 2).reshape(1, x.shape[2], -1) for x in (query, key, value))
    out = CROSS(q, k, v, num_heads, num_kv_heads, scale, 0, float(softcap or 0.0))
    return out.view(1, query.shape[2], num_heads, -1), None


def _mask(*args: Any, mask_function: Any, **given: Any) -> Tensor | None:
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    if mask_function is bidirectional_mask_function:
        return None
    make: Any = eager_mask
    made: Tensor | None = make(*args, mask_function=mask_function, **given)
    return made


@contextmanager
def encoder_attention(model: Any) -> Iterator[None]:
    """Meanwhile the attention of a transformers model is that of an encoder."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
