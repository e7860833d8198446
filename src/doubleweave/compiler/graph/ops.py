"""The operators Doubleweave adds to PyTorch: attention over a growing cache, its rows, and rotary embedding.

All are pure functions of their inputs: an operator that changed a cache in place would be functionalised, with a copy
of the whole cache in each call. In eager mode they compute their reference in plain operators (`*_reference`); a
program calls the `.out` overload, whose kernel is in native/src/operators.cpp. This module knows nothing of models,
splits or ExecuTorch programs.

Shape legend: B batch (always 1), T new tokens, S tokens in the cache (T newest included), H query
heads, K key-value heads, D head dim, R rotary dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from doubleweave.compiler.graph.cache_rows import as_float, empty_rows, stored
from doubleweave.ir.cache_format import SCALE_BYTES

_LIBRARY: Any = torch.library.Library("doubleweave", "DEF")  # type: ignore[no-untyped-call]

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, int num_heads, int num_kv_heads, float scale, int window, float soft_cap"
)
# ExecuTorch calls the `.out` overloads: results are written into memory that is planned, or bound, before the run.
for _name, _arguments in (
    ("attention", _ATTENTION),
    ("biased_attention", f"{_ATTENTION}, int block, Tensor? sinks, Tensor? slopes, Tensor? distances"),
    ("cross_attention", _ATTENTION),
    ("rotary", "Tensor x, Tensor cos, Tensor sin, int num_heads"),
    ("cache_rows", "Tensor x, int num_heads, ScalarType dtype"),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> Tensor")
    _LIBRARY.define(f"{_name}.out({_arguments}, *, Tensor(a!) out) -> Tensor(a!)")
    torch.library.register_fake(f"doubleweave::{_name}.out", lambda *args, out: out, lib=_LIBRARY)
_LIBRARY.define(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, int num_heads, int num_kv_heads, float scale, "
    "int window, float soft_cap, Tensor? sinks) -> Tensor"
)
_LIBRARY.define("general_attention(Tensor[] queries, Tensor[] keys, Tensor[] weights, int width) -> Tensor")
_LIBRARY.define("boundary(Tensor[] inputs, Tensor[] outputs, int call) -> Tensor[]")


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    soft_cap: float,
    block: int = 0,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    distances: Tensor | None = None,
    *,
    added: Tensor | None = None,
    is_causal: bool = True,
) -> Tensor:
    """Causal grouped-query attention in plain ops; query i sits at position S - T + i.

    q [B, T, H*D], k [B, S, K*D], v [B, S, K*Dv], float32 -> [B, T, H*Dv]; k and v may have another format of
    cache_rows.py. `window` 0 means none, else a
    query at position p sees keys in (p - window, p]; `soft_cap` 0 means none. The order of operations
    follows transformers' `eager_attention_forward`, so that results are bit-equal to it.

    The rest is `biased_attention`'s. `block` 0 means none, else a query sees no key before its own block of so many
    positions. `sinks` [H] float32 are scores that take part in the softmax's sum and have no value. `slopes` [H]
    float32 add slope * (key - query's position) to a score, behind the soft cap (ALiBi). `distances` [H, L] float32 are
    added to the scores of keys 0, 1, … tokens behind the query, the last number to those of all further ones (T5).
    `added` [.., T, S] float32 is `masked_attention`'s mask.

    Not `is_causal`, every query sees every key: `cross_attention`'s.
    """
    k, v = as_float(k), as_float(v)
    num_batches, num_queries, num_keys = q.shape[0], q.shape[1], k.shape[1]
    num_groups = num_heads // num_kv_heads
    q_BHTD = q.view(num_batches, num_queries, num_heads, -1).transpose(1, 2)
    k_BHSD = k.view(num_batches, num_keys, num_kv_heads, -1).transpose(1, 2)
    v_BHSD = v.view(num_batches, num_keys, num_kv_heads, -1).transpose(1, 2)
    if num_groups > 1:
        k_BHSD = k_BHSD.repeat_interleave(num_groups, dim=1)
        v_BHSD = v_BHSD.repeat_interleave(num_groups, dim=1)
    scores_BHTS = torch.matmul(q_BHTD, k_BHSD.transpose(2, 3)) * scale
    if soft_cap > 0:
        scores_BHTS = torch.tanh(scores_BHTS / soft_cap) * soft_cap
    position_T = torch.arange(num_queries, device=q.device).unsqueeze(1) + (num_keys - num_queries)
    key_S = torch.arange(num_keys, device=q.device).unsqueeze(0)
    visible_TS = (key_S <= position_T) | (not is_causal)
    if window > 0:
        visible_TS = visible_TS & (key_S > position_T - window)
    if block > 0:
        visible_TS = visible_TS & (key_S >= position_T // block * block)
    if slopes is not None:
        scores_BHTS = scores_BHTS + slopes.view(-1, 1, 1) * (key_S - position_T)
    if distances is not None:
        behind_TS = (position_T - key_S).clamp(0, distances.shape[1] - 1)
        scores_BHTS = scores_BHTS + distances[:, behind_TS]
    if added is not None:
        scores_BHTS = scores_BHTS + added
    scores_BHTS = scores_BHTS.masked_fill(~visible_TS, torch.finfo(scores_BHTS.dtype).min)
    if sinks is not None:
        sinks_BHT1 = sinks.view(1, -1, 1, 1).expand(num_batches, -1, num_queries, 1)
        scores_BHTS = torch.cat((scores_BHTS, sinks_BHT1), dim=-1)
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32).to(q.dtype)[..., :num_keys]
    out_BTHD = torch.matmul(weights_BHTS, v_BHSD).transpose(1, 2).contiguous()
    return out_BTHD.view(num_batches, num_queries, -1)


# Attention of a decoder to all rows of an encoder: q [B, T, H*D], k [B, E, K*D], v [B, E, K*Dv], float32. Parameters
# are those of `attention`, each at the same place; `window` is 0.
cross_attention_reference = partial(attention_reference, is_causal=False)
_ATTENTION_REFERENCES: dict[str, Callable[..., Tensor]] = {
    "attention": attention_reference,
    "biased_attention": attention_reference,
    "cross_attention": cross_attention_reference,
}


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotary position embedding in plain ops, the half-rotation convention of transformers' Llama.

    x [B, T, H*D], cos and sin [B, T, R] -> [B, T, H*D]; only the first R dims of each head turn.
    """
    num_rotary = cos.shape[-1]
    x_BTHD = x.view(x.shape[0], x.shape[1], num_heads, -1)
    turned = x_BTHD[..., :num_rotary]
    half = num_rotary // 2
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    turned = turned * cos.unsqueeze(2) + swapped * sin.unsqueeze(2)
    out = torch.cat((turned, x_BTHD[..., num_rotary:]), dim=-1)
    return out.view(x.shape)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_kv_heads: int, *_: object) -> Tensor:
    # The heads of V may be narrower or wider than those of Q and K.
    width = v.shape[3] - SCALE_BYTES if v.dtype == torch.int8 else v.shape[2] // num_kv_heads
    return q.new_empty(q.shape[0], q.shape[1], width * num_heads)


def masked_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_heads: int, num_kv_heads: int, *more: Any
) -> Tensor:
    """`attention_reference` under a mask besides, [.., T, T]: True for what is seen, or float32 to add to scores."""
    scale, window, soft_cap, sinks = more
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return attention_reference(
        q, k, v, num_heads, num_kv_heads, scale, window, soft_cap, sinks=sinks, added=mask
    )


# `masked_attention` stands in an exported graph for attention under a mask that the model made, until the mask is
# understood (written_attention.py); it never reaches a program.
torch.library.register_fake(
    "doubleweave::masked_attention",
    lambda q, k, v, mask, num_heads, num_kv_heads, *_: _fake_attention(q, k, v, num_heads, num_kv_heads),
    lib=_LIBRARY,
)
# `general_attention` stands for a graph of its own (general_attention.py), which takes its place in a segment.
torch.library.register_fake(
    "doubleweave::general_attention",
    lambda queries, keys, weights, width: queries[0].new_empty(1, queries[0].shape[1], width),
    lib=_LIBRARY,
)
_LIBRARY.impl("masked_attention", masked_attention_reference, "CompositeExplicitAutograd")
# `boundary` marks in an exported graph where a nested module is called (compiler/trace); it never reaches a program.
# Its results are copies, because an operator that is pure must not return its own inputs.
_COMPUTED: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    *((name, reference, _fake_attention) for name, reference in _ATTENTION_REFERENCES.items()),
    ("rotary", rotary_reference, lambda x, *_: torch.empty_like(x)),
    ("cache_rows", stored, empty_rows),
    (
        "boundary",
        lambda _, outputs, call: [x.clone() for x in outputs],
        lambda _, outputs, call: [x.new_empty(x.shape) for x in outputs],
    ),
)
for _name, _compute, _fake in _COMPUTED:
    # CompositeExplicitAutograd keeps the operator whole in exported graphs; an implicit one is decomposed.
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"doubleweave::{_name}", _fake, lib=_LIBRARY)

# All take q, k, v and the same parameters first, each at the same place.
BIASED = torch.ops.doubleweave.biased_attention.default
CROSS = torch.ops.doubleweave.cross_attention.default  # to an encoder's rows: no cache that grows
REFERENCES: dict[Any, Callable[..., Tensor]] = {
    getattr(torch.ops.doubleweave, name).default: reference
    for name, reference in _ATTENTION_REFERENCES.items()
}
ATTENTIONS = tuple(REFERENCES)
CACHE_ROWS = torch.ops.doubleweave.cache_rows.default
MASKED = torch.ops.doubleweave.masked_attention.default
GENERAL = torch.ops.doubleweave.general_attention.default


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: tuple[int, int, float, int, float],
    *,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Call the operator that suffices; `parameters` are (num_heads, num_kv_heads, scale, window, soft_cap)."""
    ops = torch.ops.doubleweave
    found: Tensor
    if mask is not None:
        found = ops.masked_attention(q, k, v, mask, *parameters, sinks)
    elif sinks is not None:
        found = ops.biased_attention(q, k, v, *parameters, 0, sinks, None, None)
    else:
        found = ops.attention(q, k, v, *parameters)
    return found
