"""Put the weights of quantized linears, and of experts, into the order in which the kernel on the CPU reads them.

The kernel (native/include/doubleweave/linears.h) reads them where they lie in the program's file, so that nothing is
packed when the program is loaded, nothing is in memory twice, and nothing is read of experts that nobody chooses.

Shape legend: E experts (1 of a linear), N output features, K input features, G groups of them (32 of 4 bits, 64 of 8),
B blocks of 16 output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.linear_ops import (
    GROUP_SIZE,
    INT8_GROUP,
    LINEAR_QUANTIZED,
    LINEAR_ROWS,
)
from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of, same_shape
from doubleweave.compiler.graph.norms import match_rms_norm
from doubleweave.compiler.split.transform import copy_graph, number_weights, over_empty_weights
from doubleweave.compiler.split.weights import Convert, Weights
from doubleweave.errors import LowerError

aten = torch.ops.aten
ours = torch.ops.doubleweave

BLOCK, BUNDLE = 16, 4
# RowKind in native/include/doubleweave/linears.h.
_PLAIN, _SILU, _GELU, _NORMED = range(4)
_PACKED = {
    LINEAR_QUANTIZED: ours.linear_packed.default,
    LINEAR_ROWS: ours.table_rows_packed.default,
    ours.expert_linear.default: ours.expert_linear_packed.default,
    ours.expert_linear_quantized.default: ours.expert_linear_packed.default,
}


def with_packed_linears(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """A structure that calls the operators over packed weights, and what it does to a segment's weights."""
    graph = copy_graph(graph_module)
    made: dict[str, Convert] = {}  # new weights, by name: each from a segment's weights
    rounded: dict[Any, Any] = {}  # rows, by what they are rounded from: linears share them
    for node in nodes_of(graph):
        if is_call(node, *_PACKED):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_packed(graph, node, made, rounded))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    names = number_weights(graph)

    def convert(weights: Weights) -> Weights:
        return tuple(made[name](weights)[0] if name in made else weights[int(name[1:])] for name in names)

    return over_empty_weights(graph), convert


def _packed(graph: fx.Graph, node: Any, made: dict[str, Convert], rounded: dict[Any, Any]) -> Any:
    is_one = is_call(node, LINEAR_QUANTIZED, LINEAR_ROWS)  # not one of several experts
    rows, (weight, *rest) = (node.args[:1], node.args[1:]) if is_one else (node.args[:2], node.args[2:])

    def packed(part: str, pack: Callable[[Tensor], Tensor], source: Any) -> Any:
        if source is None:
            return None
        if source.op != "get_attr":
            raise LowerError(f"the weights {source.name} are computed: expected the model's constants")
        number = int(source.target[1:])

        def of_experts(tensor: Tensor) -> Tensor:
            return pack(tensor.unsqueeze(0) if is_one else tensor)

        name = f"{source.target}.{part}"
        result = graph.get_attr(name)
        result.meta["val"] = of_experts(source.meta["val"])
        made[name] = lambda weights: (of_experts(weights[number]),)
        return result

    out_features, columns = map(int, weight.meta["val"].shape[-2:])
    # Of 8 bits, weights have zeros up to a whole group.
    in_features = int((node if is_call(node, LINEAR_ROWS) else rows[0]).meta["val"].shape[-1])
    if is_call(node, ours.expert_linear.default):
        parts = [packed("floats", pack_float32, weight), None, None, None, *(rest or [None])]
    else:
        scales, offsets, offset_scales, bias = (*rest, None, None, None)[:4]
        bias = None if is_call(node, LINEAR_ROWS) else bias
        is_int4 = columns == GROUP_SIZE * int(scales.meta["val"].shape[-1])
        parts = [
            packed("packed", pack_int4 if is_int4 else pack_int8, weight),
            packed("scales", pack_scales, scales),
            packed("offsets", pack_offsets, offsets),
            packed("offset_scales", pack_offset_scales, offset_scales),
            bias,
        ]
    if is_call(node, LINEAR_QUANTIZED):
        if rows[0] not in rounded:
            rounded[rows[0]] = insert(graph, ours.pack_rows.default, *_source(rows[0]), like=node)
        rows = (rounded[rows[0]],)
    return insert(graph, _PACKED[node.target], *rows, *parts, in_features, out_features, like=node)


def _source(x: Any) -> tuple[Any, Any, int, float]:
    """What rows are computed from as they are rounded: (x, the other, how, epsilon) of `pack_rows`. A product with a
    gate, and a norm, are then never in memory."""
    if is_call(x, aten.mul.Tensor):
        if (norm := match_rms_norm(x)) is not None:
            source, weight, epsilon = norm
            width = x.meta["val"].shape[-1]
            if tuple(weight.meta["val"].shape) == (width,) and source.meta["val"].dtype == torch.float32:
                return source, weight, _NORMED, epsilon
        for gate, other in (x.args[:2], x.args[1::-1]):
            kind = _gate_kind(gate)
            if kind and isinstance(other, fx.Node) and same_shape(gate.meta["val"], other.meta["val"]):
                return gate.args[0], other, kind, 0.0
    return x, None, _PLAIN, 0.0


def _gate_kind(node: Any) -> int:
    if is_call(node, aten.silu.default):
        return _SILU
    is_tanh = is_call(node, aten.gelu.default) and node.kwargs.get("approximate", "none") == "tanh"
    return _GELU if is_tanh else 0


def _blocks(x: Tensor) -> Tensor:
    """[E, N, …] -> [E, B, 16, …]; zeros behind the last output feature."""
    behind = (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % BLOCK)
    return pad(x, behind).view(x.shape[0], -1, BLOCK, *x.shape[2:])


def pack_float32(weight: Tensor) -> Tensor:
    """float32 [E, N, K] -> [E, B, K, 16]."""
    return _blocks(weight).transpose(2, 3).contiguous()


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [E, N, K] -> bytes that are 128 more, in bundles of [B, G, 16, 16, 4]."""
    rows = _blocks(weight)
    quads = rows.view(*rows.shape[:3], -1, INT8_GROUP // 4, 4)  # [E, B, 16, G, 16, 4]
    return _bundles(torch.bitwise_xor(quads.permute(0, 1, 3, 4, 2, 5), -128))


def pack_int4(weight: Tensor) -> Tensor:
    """int8 [E, N, K] in -8 … 7 -> bytes with two weights each, which are 8 more, in bundles of [B, G, 4, 16, 4].

    Of eight input features the first four are in the low halves, the others in the high ones.
    """
    rows = _blocks(weight) + 8
    low, high = rows.view(*rows.shape[:3], -1, 4, 2, 4).unbind(5)  # [E, B, 16, G, 4, 4]
    both = torch.bitwise_or(low, torch.bitwise_left_shift(high, 4))
    return _bundles(both.permute(0, 1, 3, 4, 2, 5))


def _bundles(blocks: Tensor) -> Tensor:
    """[E, B, G, …] -> [E, bundles of [G, B, …]]: each of four blocks, the last one of those that are left."""
    num_experts, num_blocks = blocks.shape[:2]
    whole = num_blocks // BUNDLE * BUNDLE
    bundles = blocks[:, :whole].reshape(num_experts, -1, BUNDLE, *blocks.shape[2:]).transpose(2, 3).flatten(1)
    return torch.cat((bundles, blocks[:, whole:].transpose(1, 2).flatten(1)), dim=1)


def pack_scales(scales: Tensor) -> Tensor:
    """float32 [E, N, G] -> bundles of bfloat16 [B, G, 16]."""
    return _bundles(_blocks(scales).transpose(2, 3)).to(torch.bfloat16)


def pack_offset_scales(scales: Tensor) -> Tensor:
    """float32 [E, N] -> [E, B, 16]."""
    return _blocks(scales)


def pack_offsets(offsets: Tensor) -> Tensor:
    """int8 [E, N, G] -> bundles of [B, G/2, 16, 2]; zeros behind the last group."""
    blocks = _blocks(pad(offsets, (0, offsets.shape[2] % 2)))
    return _bundles(blocks.view(*blocks.shape[:3], -1, 2).transpose(2, 3))
