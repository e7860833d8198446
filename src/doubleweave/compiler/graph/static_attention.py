"""Inline attention over a cache of fixed length, for compilers that want every shape fixed (the all-static way).

Each attention operator becomes plain operators over all rows of the cache and the chunk's own keys and values, under a
mask. The cache's rows are inputs, and a piece of its own computes the masks from the positions. The form follows the
static models of ExecuTorch's Qualcomm examples (examples/qualcomm/oss_scripts/llama), but the cache is token-major here
and the chunk's own rows come behind all of it. This module knows nothing of backends.

No operator has the number of rows in its arguments: a graph is quantized once, at one size, and lowered at every size.

Shape legend: T new tokens, C rows of the cache, H query heads, K key-value heads, G query heads a key-value head (a
group), D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from doubleweave.compiler.graph import ops as _ops  # noqa: F401  registers doubleweave::attention
from doubleweave.compiler.graph.nodes import PAST, output_node

# In the meta of a placeholder of earlier rows: multiply-adds for each query and each such row.
WIDTH = "width"
# The module, and so the segment, of the operators that compute masks: once a chunk, not once a layer.
MASK = "mask"

_ATTENTION = torch.ops.doubleweave.attention.default


def inline_attention(graph_module: fx.GraphModule, max_context: int, hidden: float) -> None:
    """Replace every attention operator, over caches of `max_context` rows.

    `hidden` is added to the scores of keys that a query does not see: low enough to leave them no weight, and high
    enough not to take the scale of quantized scores. Keys and values become outputs of the graph.
    """
    graph = graph_module.graph
    inline, mask_stack = partial(_inline, graph), {MASK: (MASK, MASK)}
    position_ids = next(n for n in graph.nodes if n.op == "placeholder" and n.target == "position_ids")
    attentions = [node for node in graph.nodes if node.target is _ATTENTION]
    graph_module.register_buffer("cache_rows", torch.arange(max_context).float())
    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        rows = graph.get_attr("cache_rows")
        fake_mode = position_ids.meta["val"].fake_mode
        rows.meta["val"] = fake_mode.from_tensor(graph_module.cache_rows, static_shapes=True)
        offsets = inline(offsets_in_chunk, [position_ids], (), mask_stack)
    masks: dict[tuple[int, int], tuple[fx.Node, fx.Node]] = {}
    appended = []
    for layer, node in enumerate(attentions):
        q, k, v, num_heads, num_kv_heads, scale, window, soft_cap = node.args
        stack = node.meta.get("nn_module_stack", {})
        group = num_heads // num_kv_heads
        # Layers with one window share a mask: Gemma 3 has two windows, most models one.
        if (window, group) not in masks:
            with graph.inserting_before(offsets.next):
                past_mask = inline(mask_of_past, [position_ids, rows], (window, hidden), mask_stack)
            with graph.inserting_before(node):
                masks[window, group] = (
                    inline(for_groups, [past_mask], (group,), stack),
                    inline(mask_of_chunk, [offsets], (window, hidden, group), stack),
                )
        pasts = []
        for source, letter in ((k, "k"), (v, "v")):
            with graph.inserting_after(position_ids):
                past = graph.placeholder(f"past_{letter}_{layer}")
            width = source.meta["val"].shape[2]
            past.meta["val"] = source.meta["val"].new_empty(1, max_context, width)
            past.meta[PAST] = source
            past.meta[WIDTH] = num_heads * (width // num_kv_heads)
            pasts.append(past)
        with graph.inserting_before(node):
            parameters = (num_heads, num_kv_heads, scale, soft_cap)
            out = inline(static_attention, [q, k, v, *pasts, *masks[window, group]], parameters, stack)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        appended += [k, v]
    result = output_node(graph)
    result.args = ((*result.args[0], *appended),)
    graph_module.recompile()


def offsets_in_chunk(position_ids: Tensor) -> Tensor:
    """The distance of each token from the chunk's first: int64 [1, T], consecutive -> float32 [1, T, 1]."""
    return (position_ids - position_ids[:, :1]).unsqueeze(2).float()


def mask_of_past(position_ids: Tensor, rows: Tensor, window: int, hidden: float) -> Tensor:
    """The mask added to the scores of the cache's rows: position_ids int64 [1, T], rows 0 to C - 1 -> [1, T, C].

    It hides rows that no earlier chunk has written and, under a `window`, rows a window or more before the token.
    """
    # Differences of whole numbers, clamped: -1 where a row is hidden, 0 where it is seen.
    position_T1 = position_ids.unsqueeze(2).float()
    seen_TC = torch.clamp(position_T1[:, :1] - 1.0 - rows, -1.0, 0.0)
    if window > 0:
        seen_TC = torch.minimum(seen_TC, torch.clamp(rows - position_T1 + (window - 1.0), -1.0, 0.0))
    else:
        seen_TC = seen_TC + position_T1 * 0.0  # broadcasts to T rows without their number in the arguments
    return seen_TC * -hidden


def mask_of_chunk(offsets: Tensor, window: int, hidden: float, group: int) -> Tensor:
    """The mask added to the scores of the chunk's own keys, which hides later ones: [1, T, 1] -> [1, 1, G*T, T]."""
    behind_TT = offsets - offsets.permute(0, 2, 1)
    seen_TT = torch.clamp(behind_TT, -1.0, 0.0)
    if window > 0:
        seen_TT = seen_TT + torch.clamp((window - 1.0) - behind_TT, -1.0, 0.0)
    return for_groups(seen_TT * -hidden, group)


def for_groups(mask: Tensor, group: int) -> Tensor:
    """[1, T, S] -> [1, 1, G*T, S], the same for every query head of a group."""
    return torch.cat([mask] * group, dim=1).unsqueeze(1) if group > 1 else mask.unsqueeze(1)


def static_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_mask: Tensor,
    chunk_mask: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    soft_cap: float,
) -> Tensor:
    """Grouped-query attention over a cache of fixed length.

    q [1, T, H*D], k and v [1, T, K*D], past_k and past_v [1, C, K*D], past_mask [1, 1, G*T, C], chunk_mask
    [1, 1, G*T, T], float32 -> [1, T, H*D].
    """
    cached, width = past_k.shape[1], q.shape[2]
    head_dim, value_dim = width // num_heads, v.shape[2] // num_kv_heads
    q_HTD = q.view(1, -1, num_heads, head_dim).permute(0, 2, 1, 3)
    # A group's query heads are rows of one matrix: G*T of them.
    # Scaling Q takes D products a row, scaling the scores would take C + T.
    q_KRD = (q_HTD * scale).reshape(1, num_kv_heads, -1, head_dim)

    def scores(keys: Tensor, mask: Tensor) -> Tensor:
        k_KDS = keys.view(1, -1, num_kv_heads, head_dim).permute(0, 2, 3, 1)
        found = torch.matmul(q_KRD, k_KDS)
        if soft_cap > 0:
            found = torch.tanh(found * (1 / soft_cap)) * soft_cap
        return found + mask

    def weighted(weights: Tensor, values: Tensor) -> Tensor:
        v_KSD = values.view(1, -1, num_kv_heads, value_dim).permute(0, 2, 1, 3)
        return torch.matmul(weights, v_KSD)

    # The scores are joined, not the keys: joining these would copy the whole cache in every layer.
    both = torch.cat((scores(past_k, past_mask), scores(k, chunk_mask)), dim=-1)
    weights_KRS = torch.softmax(both, dim=-1)
    out_KRD = weighted(weights_KRS[..., :cached], past_v) + weighted(weights_KRS[..., cached:], v)
    out_HTD = out_KRD.reshape(1, num_heads, -1, value_dim)
    return out_HTD.permute(0, 2, 1, 3).reshape(1, -1, num_heads * value_dim)


def _inline(
    graph: fx.Graph,
    function: Callable[..., Tensor],
    inputs: list[fx.Node],
    parameters: tuple[Any, ...],
    stack: dict[str, Any],
) -> fx.Node:
    """Insert the operators of `function(*inputs, *parameters)` at the insertion point; returns the result's node.

    The function is traced over the fake values of `inputs`; `stack` becomes the operators' place in the module.
    """
    trace = make_fx(lambda *tensors: function(*tensors, *parameters), tracing_mode="real", pre_dispatch=True)
    traced = trace(*(node.meta["val"] for node in inputs))
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    copied: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    *operators, output = (node for node in traced.graph.nodes if node not in copied)
    for node in operators:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = {"val": node.meta["val"], "nn_module_stack": stack}
    found: fx.Node = copied[output.args[0]]
    return found
