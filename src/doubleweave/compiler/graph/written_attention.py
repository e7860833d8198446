"""Recognise attention that a model writes in plain operators, or under a mask of its own, as the attention operator.

Found from its softmax: back to the product of queries and keys, forward to the product with values. All in between is
taken for a function of the product and of positions, whatever operators it is made of, and is replaced where it gives
the weights of the operator at several sizes over random scores (position_bias.py). What gives others is refused with
the cause. This module knows nothing of segments or transformers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.general_attention import general_attention
from doubleweave.compiler.graph.nodes import constant, expression, insert, is_call, is_tensor, nodes_of
from doubleweave.compiler.graph.ops import CROSS, MASKED
from doubleweave.compiler.graph.position_bias import Bias, NotUnderstood, Positions, bias_of, understood
from doubleweave.compiler.graph.refusal_causes import place_of_node
from doubleweave.errors import SplitError

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCT = (aten.matmul.default, aten.bmm.default)
# A product that adds something: input, a, b -> beta * input + alpha * (a @ b).
_ADDING = (aten.baddbmm.default,)
_SDPA = aten.scaled_dot_product_attention.default
_GENERATOR_SEED = 20262
_CAUSE = "not_understood"  # in the meta of what attention results in: why it is not the operator's


class _Scores(NamedTuple):
    """How scores become weights: scale, soft cap and what positions add."""

    scale: float
    soft_cap: float
    bias: Bias


def recognise_attention(graph_module: fx.GraphModule, model: str) -> None:
    """Replace attention in plain operators by the operator; raises SplitError where it is another function."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_SDPA):
        _write_out(graph, node)
    graph.eliminate_dead_code()
    positions = Positions(graph_module)
    known: dict[str, _Scores] = {}
    for node in nodes_of(graph):
        try:
            if node.target is MASKED:
                _replace_masked(graph_module, node, positions)
            elif is_call(node, *_SOFTMAX) and _is_over_keys(node, positions):
                _replace_written(graph_module, node, positions, known)
        except NotUnderstood as found:
            _result_of(node, positions, model, str(found)).meta[_CAUSE] = str(found)
    graph.eliminate_dead_code()
    graph_module.recompile()


def keep_other_attention(graph_module: fx.GraphModule, model: str) -> None:
    """Keep attention that `recognise_attention` did not understand in plain operators, over keys that are cached.

    Raises SplitError where its queries and keys cannot be told apart.
    """
    positions = Positions(graph_module)
    for node in nodes_of(graph_module.graph):
        if (cause := node.meta.get(_CAUSE)) is not None:
            try:
                general_attention(graph_module, node, positions)
            except NotUnderstood as found:
                raise _refusal(node, model, f"{cause}, and {found}") from None
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _result_of(node: Any, positions: Positions, model: str, cause: str) -> Any:
    """What attention results in, of its node under a mask or its softmax; raises SplitError where it is not found."""
    if node.target is MASKED:
        return node
    inside = {node}
    for user in nodes_of(node.graph):
        sources = inside.intersection(user.all_input_nodes)
        if sources and is_call(user, *_PRODUCT) and user.args[0] in inside:
            return user
        if sources and positions.given_by_rows(user):
            inside.add(user)
    raise _refusal(node, model, cause)


def _refusal(node: Any, model: str, cause: str) -> SplitError:
    return SplitError(
        f"{model}: the attention of {place_of_node(node)} is not understood: {cause}; expected "
        "softmax(scale * q kT + bias) v, where the bias hides later keys and perhaps those outside of a window "
        "or a block, or is a slope a head (ALiBi) or a number for each distance (T5); this architecture is not "
        "supported"
    )


def _is_over_keys(node: Any, positions: Positions) -> bool:
    shape = node.meta["val"].shape
    return (
        node.args[1] in (-1, len(shape) - 1)
        and node not in positions.nodes
        and positions.symbol in expression(shape[-1]).free_symbols
    )


def _write_out(graph: fx.Graph, node: Any) -> None:
    """scaled_dot_product_attention as a product, a softmax and a product."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    q, k, v, mask = (given.get(name) for name in names[:4])
    if given.get("enable_gqa") or any(len(n.meta["val"].shape) != 4 for n in (q, k, v)):
        return
    scale = given.get("scale") or q.meta["val"].shape[-1] ** -0.5
    with graph.inserting_before(node):
        transposed = insert(graph, aten.transpose.int, k, -2, -1, like=node)
        scores = insert(graph, aten.matmul.default, q, transposed, like=node)
        scores = insert(graph, aten.mul.Tensor, scores, float(scale), like=node)
        if given.get("is_causal"):
            ones = insert(graph, aten.ones_like.default, scores, like=node)
            upper = insert(graph, aten.triu.default, ones, 1, like=node)
            scores = insert(
                graph,
                aten.add.Tensor,
                scores,
                insert(graph, aten.mul.Tensor, upper, -1e30, like=node),
                like=node,
            )
        elif mask is not None and mask.meta["val"].dtype == torch.bool:
            hidden = insert(graph, aten.logical_not.default, mask, like=node)
            scores = insert(graph, aten.masked_fill.Scalar, scores, hidden, -1e30, like=node)
        elif mask is not None:
            scores = insert(graph, aten.add.Tensor, scores, mask, like=node)
        weights = insert(graph, aten.softmax.int, scores, -1, like=node)
        result = insert(graph, aten.matmul.default, weights, v, like=node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _replace_masked(graph_module: fx.GraphModule, node: Any, positions: Positions) -> None:
    """attention under a mask that the model made -> attention that knows the mask by its parameters."""
    q, k, v, mask, *parameters, sinks = node.args
    if mask not in positions.nodes:
        raise NotUnderstood("its mask follows from what the tokens are, not from where they stand")
    if _is_across(k, positions):
        _replace_across(graph_module, node, positions)
        return
    bias = bias_of(mask, positions)
    num_heads, num_kv_heads, scale, window, soft_cap = parameters
    if window and window != bias.window:
        raise NotUnderstood(f"it has a window of {window}, its mask one of {bias.window}")
    given = (num_heads, num_kv_heads, scale, bias.window, soft_cap)
    with graph_module.graph.inserting_before(node):
        result = _attend(graph_module, (q, k, v), given, bias, sinks, node)
    node.replace_all_uses_with(result)
    graph_module.graph.erase_node(node)


def _is_across(k: Any, positions: Positions) -> bool:
    """Whether keys [1, E, …] are those of an encoder's rows."""
    return positions.symbol not in expression(k.meta["val"].shape[1]).free_symbols


def _replace_across(graph_module: fx.GraphModule, node: Any, positions: Positions) -> None:
    """attention to an encoder's rows under a mask that hides none -> attention without a mask."""
    q, k, v, mask, *parameters, _ = node.args
    for size in positions.sizes([], 1):
        added = positions.values([mask], size, {})[mask]
        added = (~added if added.dtype == torch.bool else added).float()
        if not float((added - added[..., :1]).abs().max()) < 1e-6:
            raise NotUnderstood("it adds to the scores of an encoder's rows by where they stand")
    with graph_module.graph.inserting_before(node):
        result = insert(graph_module.graph, CROSS, q, k, v, *parameters, like=node)
    node.replace_all_uses_with(result)
    graph_module.graph.erase_node(node)


def _attend(
    graph_module: fx.GraphModule,
    qkv: tuple[Any, Any, Any],
    parameters: Any,
    bias: Bias,
    sinks: Any,
    like: Any,
) -> Any:
    """Insert the attention operator at the insertion point: token-major q, k and v nodes -> [1, T, H*Dv]."""
    graph = graph_module.graph

    def held(what: str, numbers: Tensor | None) -> Any:
        if numbers is None:
            return None
        name = f"_{what}_{like.name}"
        graph_module.register_buffer(name, numbers.expand(parameters[0], *numbers.shape[1:]).contiguous())
        node = graph.get_attr(name)
        fake_mode = qkv[0].meta["val"].fake_mode
        node.meta["val"] = fake_mode.from_tensor(getattr(graph_module, name), static_shapes=True)
        return node

    slopes, distances = held("slopes", bias.slopes), held("distances", bias.distances)
    ops = torch.ops.doubleweave
    if bias.block == 0 and sinks is None and slopes is None and distances is None:
        return insert(graph, ops.attention.default, *qkv, *parameters, like=like)
    more = (bias.block, sinks, slopes, distances)
    return insert(graph, ops.biased_attention.default, *qkv, *parameters, *more, like=like)


class _Written(NamedTuple):
    """Attention in plain operators; `chain` lies between the products, with the softmax."""

    product: Any
    chain: list[Any]
    softmax: Any
    result: Any

    @property
    def weights(self) -> Any:
        return self.chain[-1]


def _replace_written(
    graph_module: fx.GraphModule, softmax: Any, positions: Positions, known: dict[str, _Scores]
) -> None:
    found = _find(softmax, positions)
    q, k_transposed = found.product.args[-2:]
    v = found.result.args[1]
    num_heads = _num_heads(found.product)
    num_kv_heads = {_num_heads(k_transposed), _num_heads(v)}
    if len(num_kv_heads) != 1 or _num_heads(q) != num_heads or num_heads % min(num_kv_heads):
        raise NotUnderstood(
            f"its queries have {_num_heads(q)} heads, keys and values {sorted(num_kv_heads)} heads"
        )
    if min(num_kv_heads) not in (1, num_heads) and not _is_grouped(q, k_transposed):
        raise NotUnderstood("its heads share keys otherwise than in groups")
    key = _text(found, positions)
    if key not in known:
        known[key] = _understand(found, positions, num_heads)
    scores = known[key]
    graph = graph_module.graph
    with graph.inserting_before(found.result):
        k = insert(graph, aten.transpose.int, k_transposed, -2, -1, like=softmax)
        qkv = tuple(_token_major(graph, n, softmax) for n in (q, k, v))
        parameters = (num_heads, min(num_kv_heads), scores.scale, scores.bias.window, scores.soft_cap)
        out = _attend(graph_module, qkv, parameters, scores.bias, None, softmax)
        result = _head_major(graph, out, found.result, num_heads)
    found.result.replace_all_uses_with(result)


def _find(softmax: Any, positions: Positions) -> _Written:
    chain: list[Any] = [softmax]
    while True:
        rows = positions.given_by_rows(chain[0])
        if len(rows) != 1:
            raise NotUnderstood(f"its scores come from {len(rows)} tensors at {chain[0].target}")
        if is_call(rows[0], *_PRODUCT) or (is_call(rows[0], *_ADDING) and rows[0].args[0] in positions.nodes):
            product = rows[0]
            break
        if rows[0].op != "call_function":
            raise NotUnderstood("its scores are no product of queries and keys")
        chain.insert(0, rows[0])
    shape = product.meta["val"].shape
    if [expression(size) for size in shape[-2:]] != [positions.symbol] * 2:
        raise NotUnderstood(f"its scores have shape {[str(s) for s in shape]}, expected a key for each token")
    while True:
        users = list(chain[-1].users)
        if len(users) != 1:
            raise NotUnderstood(f"its weights are used {len(users)} times")
        if is_call(users[0], *_PRODUCT) and users[0].args[0] is chain[-1]:
            return _Written(product, chain, softmax, users[0])
        if positions.given_by_rows(users[0]) != [chain[-1]]:
            raise NotUnderstood(f"its weights are used in {users[0].target}")
        chain.append(users[0])


def _num_heads(node: Any) -> int:
    return math.prod(int(size) for size in node.meta["val"].shape[:-2])


def _is_grouped(q: Any, k: Any) -> bool:
    """Whether axes of heads that keys lack are the last ones: [.., K, G, T, D] and [.., K, 1, D, T]."""
    q_heads, k_heads = (list(map(int, n.meta["val"].shape[:-2])) for n in (q, k))
    if len(q_heads) != len(k_heads):
        return False
    same = next((i for i, (a, b) in enumerate(zip(q_heads, k_heads, strict=True)) if a != b), len(q_heads))
    return all(size == 1 for size in k_heads[same:])


def _text(found: _Written, positions: Positions) -> str:
    """What the weights are computed by: equal texts, equal functions."""
    names = {found.product: "product"} | {node: f"step{i}" for i, node in enumerate(found.chain)}
    adding = found.product.args[:1] if is_call(found.product, *_ADDING) else ()
    lines = [str(found.product.meta["val"].shape), str((found.product.target, adding, found.product.kwargs))]
    for node in found.chain:
        args = fx.map_arg((node.args, node.kwargs), lambda n: names.get(n, _name(n, positions)))
        lines.append(f"{node.target} {args}")
    return "\n".join(lines)


def _name(node: fx.Node, positions: Positions) -> str:
    is_number = is_tensor(node) and node.op == "get_attr" and node.meta["val"].numel() == 1
    if is_number:  # each use of a number is a constant of its own
        return f"{node.meta['val'].dtype} {constant(positions.module, node).tolist()}"
    return node.name if is_tensor(node) else str(node.meta.get("val"))


def _understand(found: _Written, positions: Positions, num_heads: int) -> _Scores:
    """Compute the chain at several sizes; raises NotUnderstood where no parameters of the operator give its weights."""
    product, scores = found.product, found.softmax.args[0]

    def compute(node: Any, raw: Tensor) -> Tensor:
        """A node of the chain [H, T, T] where the product is `raw` [H, T, T]."""
        size = raw.shape[-1]
        shape = [positions.size(s, size) for s in product.meta["val"].shape]
        value = raw.reshape(shape)
        if is_call(product, *_ADDING):
            added = product.args[0]
            beta, alpha = (product.kwargs.get(name, 1) for name in ("beta", "alpha"))
            value = beta * positions.values([added], size, {})[added] + alpha * value
        found = value if node is product else positions.values([node], size, {product: value})[node]
        return found.float().reshape(num_heads, size, size)

    biases = {}
    sizes = positions.sizes(_position_inputs(found, positions), num_heads)
    for size in sizes:
        try:
            biases[size] = compute(scores, torch.zeros(num_heads, size, size))
        except Exception as error:
            # Past what the model's own buffers allow there is nothing to know.
            if size == sizes[0]:
                raise NotUnderstood(f"its scores cannot be computed for {size} tokens ({error})") from None
    bias = understood(biases, lambda size: compute(scores, torch.zeros(num_heads, size, size)))
    generator = torch.Generator().manual_seed(_GENERATOR_SEED)
    small = [size for size in biases if size <= 41]
    own = compute(scores, torch.ones(num_heads, small[-1], small[-1])) - biases[small[-1]]
    scale = float(own[0, -1, -1])
    soft_cap = 0.0
    if any(is_call(node, aten.tanh.default) for node in found.chain):
        huge = torch.full((num_heads, small[-1], small[-1]), 1e9)
        soft_cap = float((compute(scores, huge) - biases[small[-1]])[0, -1, -1])
        step = compute(scores, torch.full_like(huge, 1e-3)) - biases[small[-1]]
        scale = float(step[0, -1, -1]) * 1e3
    if not scale > 0:
        raise NotUnderstood(f"its scores are the products times {scale:.3g}")
    for size in small:
        raw = torch.randn(num_heads, size, size, generator=generator) * (2 / scale)
        wanted = raw * scale
        wanted = soft_cap * torch.tanh(wanted / soft_cap) if soft_cap else wanted
        weights = torch.softmax(wanted + bias.scores(size), dim=-1)
        off = float((compute(found.weights, raw) - weights).abs().max())
        if not off < 1e-4:
            raise NotUnderstood(f"its weights are not a softmax of scaled scores: off by {off:.1g}")
    return _Scores(scale, soft_cap, bias)


def _position_inputs(found: _Written, positions: Positions) -> list[fx.Node]:
    nodes = [source for node in (found.product, *found.chain) for source in node.all_input_nodes]
    return [node for node in nodes if node in positions.nodes]


def _token_major(graph: fx.Graph, node: Any, like: Any) -> Any:
    """[heads…, T, D] -> [1, T, H*D]."""
    shape = node.meta["val"].shape
    rank, num_heads, width = len(shape), _num_heads(node), int(shape[-1])
    num_tokens = insert(graph, aten.sym_size.int, node, rank - 2, like=like)
    if rank != 4 or int(shape[0]) != 1:
        node = insert(graph, aten.reshape.default, node, [1, num_heads, num_tokens, width], like=like)
    turned = insert(graph, aten.transpose.int, node, 1, 2, like=like)
    return insert(graph, aten.reshape.default, turned, [1, num_tokens, num_heads * width], like=like)


def _head_major(graph: fx.Graph, out: Any, like: Any, num_heads: int) -> Any:
    """[1, T, H*Dv] -> the shape of `like`, [heads…, T, Dv]."""
    shape = like.meta["val"].shape
    num_tokens = insert(graph, aten.sym_size.int, out, 1, like=like)
    heads = insert(graph, aten.view.default, out, [1, num_tokens, num_heads, int(shape[-1])], like=like)
    turned = insert(graph, aten.transpose.int, heads, 1, 2, like=like)
    if len(shape) == 4 and int(shape[0]) == 1:
        return turned
    sizes = [*map(int, shape[:-2]), num_tokens, int(shape[-1])]
    return insert(graph, aten.reshape.default, turned, sizes, like=like)
