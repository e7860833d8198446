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

from doubleweave.compiler.graph.nodes import PAST, constant, output_node
from doubleweave.compiler.graph.ops import ATTENTIONS, CROSS, GENERAL
from doubleweave.compiler.graph.positions import are_split, placeholder_of, positions_meant
from doubleweave.compiler.graph.refusal_causes import place_of_node
from doubleweave.errors import SplitError

# In the meta of a placeholder of earlier rows: multiply-adds for each query and each such row.
WIDTH = "width"
# The module, and so the segment, of the operators that compute masks: once a chunk, not once a layer.
MASK = "mask"


def inline_attention(graph_module: fx.GraphModule, max_context: int, hidden: float) -> None:
    """Replace every attention operator, over caches of `max_context` rows.

    `hidden` is added to the scores of keys that a query does not see: low enough to leave them no weight, and high
    enough not to take the scale of quantized scores. Keys and values become outputs of the graph.
    Raises SplitError for attention in a model's own operators.
    """
    graph = graph_module.graph
    inline, mask_stack = partial(_inline, graph), {MASK: (MASK, MASK)}
    given = placeholder_of(graph)
    if other := graph.find_nodes(op="call_function", target=GENERAL):
        raise SplitError(
            f"the attention of {place_of_node(other[0])} stays in the model's own operators: expected softmax "
            "attention under a mask of positions, which has a static form; compile with dynamic attention"
        )
    attentions = [node for node in graph.nodes if node.target in ATTENTIONS]
    graph_module.register_buffer("cache_rows", torch.arange(max_context).float())
    with graph.inserting_before(next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))):
        rows = graph.get_attr("cache_rows")
        fake_mode = given.meta["val"].fake_mode
        rows.meta["val"] = fake_mode.from_tensor(graph_module.cache_rows, static_shapes=True)
        # The mask is a segment of its own: what it shared with another would order the two.
        position_ids = inline(positions_meant, [given], (), mask_stack) if are_split(graph) else given
        offsets = inline(offsets_in_chunk, [position_ids], (), mask_stack)
    masks: dict[tuple[int, int, int], tuple[fx.Node, ...]] = {}
    distances: list[fx.Node] = []
    appended: list[Any] = []
    for layer, node in enumerate(attentions):
        q, k, v, num_heads, num_kv_heads, scale, window, soft_cap = node.args[:8]
        more: Any = node.args[8:] or (0, None, None, None)
        block, sinks, slopes, by_distance = more
        if node.target is CROSS or by_distance is not None:
            what = "attends to an encoder's rows" if node.target is CROSS else "adds to scores by distance"
            raise SplitError(
                f"{place_of_node(node)} {what}, which static attention does not; use dynamic attention"
            )
        stack = node.meta.get("nn_module_stack", {})
        group = num_heads // num_kv_heads
        # Layers with one window share a mask: Gemma 3 has two windows, most models one.
        if (window, block, group) not in masks:
            with graph.inserting_before(offsets.next):
                past_mask = inline(mask_of_past, [position_ids, rows], (window, block, hidden), mask_stack)
                starts = [inline(offsets_in_block, [position_ids], (block,), mask_stack)] if block else []
            with graph.inserting_before(node):
                masks[window, block, group] = (
                    inline(for_groups, [past_mask], (group,), stack),
                    inline(mask_of_chunk, [offsets, *starts], (window, hidden, group), stack),
                )
        added = masks[window, block, group]
        if slopes is not None:
            if not distances:
                with graph.inserting_before(offsets.next):
                    distances = [inline(distances_of_past, [position_ids, rows], (), mask_stack)]
            with graph.inserting_before(node):
                of_heads = _of_heads(graph_module, slopes, num_kv_heads)
                added = (
                    inline(with_slopes, [added[0], distances[0], of_heads], (), stack),
                    inline(with_slopes_of_chunk, [added[1], offsets, of_heads], (), stack),
                )
        if sinks is not None:
            with graph.inserting_before(node):
                of_heads = _of_heads(graph_module, sinks, num_kv_heads)
                added = (*added, inline(sink_column, [offsets, of_heads], (), stack))
        pasts = []
        for source, letter in ((k, "k"), (v, "v")):
            with graph.inserting_after(given):
                past = graph.placeholder(f"past_{letter}_{layer}")
            width = source.meta["val"].shape[2]
            past.meta["val"] = source.meta["val"].new_empty(1, max_context, width)
            past.meta[PAST] = source
            past.meta[WIDTH] = num_heads * (width // num_kv_heads)
            pasts.append(past)
        with graph.inserting_before(node):
            parameters = (num_heads, num_kv_heads, scale, soft_cap)
            out = inline(static_attention, [q, k, v, *pasts, *added], parameters, stack)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        appended += [k, v]
    result = output_node(graph)
    result.args = ((*result.args[0], *appended),)
    graph_module.recompile()


def _of_heads(graph_module: fx.GraphModule, numbers: fx.Node, num_kv_heads: int) -> fx.Node:
    """A constant [H] as a constant [1, K, G, 1, 1]: a view would be computed in a piece of its own."""
    name = f"_of_heads_{numbers.name}"
    graph_module.register_buffer(name, constant(graph_module, numbers).reshape(1, num_kv_heads, -1, 1, 1))
    node = graph_module.graph.get_attr(name)
    fake_mode = numbers.meta["val"].fake_mode
    node.meta["val"] = fake_mode.from_tensor(getattr(graph_module, name), static_shapes=True)
    return node


def offsets_in_chunk(position_ids: Tensor) -> Tensor:
    """The distance of each token from the chunk's first: int64 [1, T], consecutive -> float32 [1, T, 1]."""
    return (position_ids - position_ids[:, :1]).unsqueeze(2).float()


def mask_of_past(position_ids: Tensor, rows: Tensor, window: int, block: int, hidden: float) -> Tensor:
    """The mask added to the scores of the cache's rows: position_ids int64 [1, T], rows 0 to C - 1 -> [1, T, C].

    It hides rows that no earlier chunk has written, under a `window` rows a window or more before the token, and under
    a `block` rows before the token's own block.
    """
    # Differences of whole numbers, clamped: -1 where a row is hidden, 0 where it is seen.
    position_T1 = position_ids.unsqueeze(2).float()
    seen_TC = torch.clamp(position_T1[:, :1] - 1.0 - rows, -1.0, 0.0)
    if window > 0:
        seen_TC = torch.minimum(seen_TC, torch.clamp(rows - position_T1 + (window - 1.0), -1.0, 0.0))
    else:
        seen_TC = seen_TC + position_T1 * 0.0  # broadcasts to T rows without their number in the arguments
    if block > 0:
        begin_T1 = torch.floor(position_T1 / block) * block
        seen_TC = torch.minimum(seen_TC, torch.clamp(rows - begin_T1, -1.0, 0.0))
    return seen_TC * -hidden


def offsets_in_block(position_ids: Tensor, block: int) -> Tensor:
    """The distance of each token from its block's first: int64 [1, T] -> float32 [1, T, 1]."""
    position_T1 = position_ids.unsqueeze(2).float()
    return position_T1 - torch.floor(position_T1 / block) * block


def mask_of_chunk(offsets: Tensor, *rest: Any) -> Tensor:
    """The mask added to the scores of the chunk's own keys, which hides later ones: [1, T, 1] -> [1, 1, G*T, T].

    `rest`: `offsets_in_block` [1, T, 1] where there are blocks, then window, hidden and group.
    """
    *starts, window, hidden, group = rest
    behind_TT = offsets - offsets.permute(0, 2, 1)
    seen_TT = torch.clamp(behind_TT, -1.0, 0.0)
    if window > 0:
        seen_TT = seen_TT + torch.clamp((window - 1.0) - behind_TT, -1.0, 0.0)
    for start_T1 in starts:
        seen_TT = torch.minimum(seen_TT, torch.clamp(start_T1 - behind_TT, -1.0, 0.0))
    return for_groups(seen_TT * -hidden, group)


def for_groups(mask: Tensor, group: int) -> Tensor:
    """[1, T, S] -> [1, 1, G*T, S], the same for every query head of a group."""
    return torch.cat([mask] * group, dim=1).unsqueeze(1) if group > 1 else mask.unsqueeze(1)


def distances_of_past(position_ids: Tensor, rows: Tensor) -> Tensor:
    """How far each row of the cache lies behind each token, 0 or less: int64 [1, T], [C] -> float32 [1, T, C]."""
    # Rows that are not written yet may lie ahead of it; a bias must not lift them out of the mask.
    return torch.clamp(rows - position_ids.unsqueeze(2).float(), max=0.0)


def with_slopes(mask: Tensor, distances: Tensor, slopes: Tensor) -> Tensor:
    """A mask and ALiBi's bias: [1, 1, G*T, S], distances [1, T, S], slopes [1, K, G, 1, 1] -> [1, K, G*T, S]."""
    return mask + _members_as_rows(distances.unsqueeze(1).unsqueeze(1) * slopes)


def with_slopes_of_chunk(mask: Tensor, offsets: Tensor, slopes: Tensor) -> Tensor:
    """`with_slopes` over the chunk's own keys: offsets [1, T, 1]."""
    return with_slopes(mask, torch.clamp(offsets.permute(0, 2, 1) - offsets, max=0.0), slopes)


def sink_column(offsets: Tensor, sinks: Tensor) -> Tensor:
    """The scores of sinks, the same for every token: offsets [1, T, 1], sinks [1, K, G, 1, 1] -> [1, K, G*T, 1]."""
    zeros = (
        offsets.unsqueeze(1).unsqueeze(1) * 0.0
    )  # broadcasts to T rows without their number in the arguments
    return _members_as_rows(zeros + sinks)


def _members_as_rows(scores: Tensor) -> Tensor:
    """[1, K, G, T, S] -> [1, K, G*T, S]."""
    return torch.cat(scores.unbind(2), dim=2)


def static_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_mask: Tensor,
    chunk_mask: Tensor,
    *rest: Any,
) -> Tensor:
    """Grouped-query attention over a cache of fixed length.

    q [1, T, H*D], k and v [1, T, K*D], past_k and past_v [1, C, K*D], past_mask [1, 1 or K, G*T, C], chunk_mask
    [1, 1 or K, G*T, T], float32 -> [1, T, H*D]. `rest`: `sink_column` where there are sinks, then num_heads,
    num_kv_heads, scale and soft_cap.
    """
    *sinks, num_heads, num_kv_heads, scale, soft_cap = rest
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
    joined = [scores(past_k, past_mask), scores(k, chunk_mask)]
    if sinks:
        # In front, where their place does not depend on the number of rows.
        joined.insert(0, sinks[0])
    weights_KRS = torch.softmax(torch.cat(joined, dim=-1), dim=-1)
    weights_KRS = weights_KRS[..., len(sinks) :] if sinks else weights_KRS
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
