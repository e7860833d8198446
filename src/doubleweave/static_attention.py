"""Inline attention over a cache of fixed length, for compilers that want every shape fixed (the all-static way).

Each attention operator becomes plain operators over the cache's rows, all of them, and the chunk's own keys and
values, under a mask; what lies in the cache comes in as inputs, and a piece of its own works the mask out from the
positions. It follows the static models of ExecuTorch's Qualcomm examples (examples/qualcomm/oss_scripts/llama), but
the cache is token-major here and the chunk's own rows come behind all of it. It knows nothing of backends or chunks.

Shape legend: T new tokens, M the most of them, C rows of the cache, H query heads, K key-value heads, G query heads
a key-value head, D head dim.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from doubleweave import ops as _ops  # noqa: F401  registers doubleweave::attention
from doubleweave.inline import inline
from doubleweave.split import PAST

WIDTH = (
    "width"  # in the meta of a placeholder of earlier rows: multiply-adds for each query and each such row
)
MASK = "mask"  # the module, and so the segment, that what computes masks belongs to

_ATTENTION = torch.ops.doubleweave.attention.default


def inline_attention(graph_module: fx.GraphModule, max_context: int, max_rows: int, hidden: float) -> None:
    """Replace every attention operator, over caches of `max_context` rows, in chunks of up to `max_rows`.

    `hidden` is added to the scores of keys that a query does not see: low enough to leave them no weight, and high
    enough not to take the scale of quantized scores. Keys and values become outputs of the graph.
    """
    graph = graph_module.graph
    position_ids = next(n for n in graph.nodes if n.op == "placeholder" and n.target == "position_ids")
    attentions = [node for node in graph.nodes if node.target is _ATTENTION]
    columns = torch.arange(max_context + max_rows)
    columns[max_context:] -= max_context
    is_new = (torch.arange(max_context + max_rows) >= max_context).float()
    graph_module.register_buffer("mask_columns", columns.float())
    graph_module.register_buffer("mask_is_new", is_new)
    masks: dict[int, fx.Node] = {}
    appended = []
    for layer, node in enumerate(attentions):
        q, k, v, num_heads, num_kv_heads, scale, window, soft_cap = node.args
        if window not in masks:
            with graph.inserting_before(_first_user_place(graph)):
                vectors = [
                    _get_attr(graph, graph_module, name, k) for name in ("mask_columns", "mask_is_new")
                ]
                stack = {MASK: (MASK, MASK)}
                masks[window] = inline(graph, mask, [position_ids, *vectors], (window, hidden), stack)
        pasts = []
        for source, letter in ((k, "k"), (v, "v")):
            with graph.inserting_after(position_ids):
                past = graph.placeholder(f"past_{letter}_{layer}")
            width = source.meta["val"].shape[2]
            past.meta["val"] = source.meta["val"].new_empty(1, max_context, width)
            past.meta[PAST] = source
            past.meta[WIDTH] = num_heads * (width // num_kv_heads)
            pasts.append(past)
        parameters = (num_heads, num_kv_heads, scale, soft_cap)
        stack = node.meta.get("nn_module_stack", {})
        with graph.inserting_before(node):
            out = inline(graph, static_attention, [q, k, v, *pasts, masks[window]], parameters, stack)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        appended += [k, v]
    result = next(node for node in reversed(graph.nodes) if node.op == "output")
    result.args = ((*result.args[0], *appended),)
    graph_module.recompile()


def mask(position_ids: Tensor, columns: Tensor, is_new: Tensor, window: int, hidden: float) -> Tensor:
    """What is added to scores: position_ids int64 [1, T] of consecutive tokens -> float32 [1, T, C + M].

    Columns are first the cache's rows, then the chunk's own: column c stands for row `columns[c]` of the cache, or
    (`is_new[c]` 1) for that row of the chunk. Hidden are rows of the cache that no chunk before has written, keys
    behind the query and, where there is a `window`, those a window or more before it.
    """
    position_T1 = position_ids.unsqueeze(2).float()
    start = position_T1[:, :1]
    key_C = columns + start * is_new
    # The last key that a query sees: itself among the chunk's own keys, the row before the chunk in the cache.
    last_TC = (start - 1) + (position_T1 - (start - 1)) * is_new
    hidden_TC = torch.clamp(last_TC - key_C, -1.0, 0.0)
    if window > 0:
        hidden_TC = torch.clamp(
            hidden_TC + torch.clamp(key_C - position_T1 + (window - 1), -1.0, 0.0), -1.0, 0.0
        )
    return hidden_TC * -hidden


def static_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    mask: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    soft_cap: float,
) -> Tensor:
    """Grouped-query attention over a cache of fixed length.

    q [1, T, H*D], k and v [1, T, K*D], past_k and past_v [1, C, K*D], mask [1, T, C + M], float32 -> [1, T, H*D].
    """
    rows, cached = q.shape[1], past_k.shape[1]
    q_KGtD = q.view(1, rows, num_heads, -1).permute(0, 2, 1, 3)
    q_KGtD = (q_KGtD * scale).reshape(1, num_kv_heads, num_heads // num_kv_heads * rows, -1)

    def scores(keys: Tensor, visible: Tensor) -> Tensor:
        k_KDS = keys.view(1, keys.shape[1], num_kv_heads, -1).permute(0, 2, 3, 1)
        found = torch.matmul(q_KGtD, k_KDS).view(1, num_heads, rows, keys.shape[1])
        if soft_cap > 0:
            found = torch.tanh(found * (1 / soft_cap)) * soft_cap
        return found + visible.unsqueeze(1)

    def weighted(weights: Tensor, values: Tensor) -> Tensor:
        v_KSD = values.view(1, values.shape[1], num_kv_heads, -1).permute(0, 2, 1, 3)
        return torch.matmul(weights.reshape(1, num_kv_heads, -1, values.shape[1]), v_KSD)

    both = (scores(past_k, mask[:, :, :cached]), scores(k, mask[:, :, cached : cached + rows]))
    weights_HTS = torch.softmax(torch.cat(both, dim=-1), dim=-1)
    out = weighted(weights_HTS[..., :cached], past_v) + weighted(weights_HTS[..., cached:], v)
    return out.view(1, num_heads, rows, -1).permute(0, 2, 1, 3).reshape(1, rows, -1)


def _first_user_place(graph: fx.Graph) -> fx.Node:
    """Behind the last placeholder."""
    return cast(fx.Node, next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr")))


def _get_attr(graph: fx.Graph, graph_module: fx.GraphModule, name: str, like: fx.Node) -> fx.Node:
    node = graph.get_attr(name)
    node.meta["val"] = like.meta["val"].fake_mode.from_tensor(getattr(graph_module, name), static_shapes=True)
    return node
