"""Put the weights of experts, and of linears in 4 bits, into the order in which the kernel on the CPU reads them.

The kernel (native/include/doubleweave/linears.h) reads them where they lie in the program's file, so that nothing is
packed when the program is loaded, nothing is in memory twice, and nothing is read of experts that nobody chooses.

Shape legend: E experts (1 of a linear), N output features, K input features, G groups of 32 of them, B blocks of 16
output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED
from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.split.transform import copy_graph, number_weights, over_empty_weights
from doubleweave.compiler.split.weights import Convert, Weights
from doubleweave.errors import LowerError

ours = torch.ops.doubleweave

BLOCK, BUNDLE = 16, 4
_OPERATORS = (LINEAR_QUANTIZED, ours.expert_linear.default, ours.expert_linear_quantized.default)


def with_packed_linears(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """A structure that calls `expert_linear_packed` and `linear_packed`, and what it does to a segment's weights."""
    graph = copy_graph(graph_module)
    made: dict[str, Convert] = {}  # new weights, by name: each from a segment's weights
    for node in nodes_of(graph):
        if is_call(node, *_OPERATORS):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_packed(graph, node, made))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    names = number_weights(graph)

    def convert(weights: Weights) -> Weights:
        return tuple(made[name](weights)[0] if name in made else weights[int(name[1:])] for name in names)

    return over_empty_weights(graph), convert


def _packed(graph: fx.Graph, node: Any, made: dict[str, Convert]) -> Any:
    is_linear = is_call(node, LINEAR_QUANTIZED)
    rows, (weight, *rest) = (node.args[:1], node.args[1:]) if is_linear else (node.args[:2], node.args[2:])

    def packed(part: str, pack: Callable[..., Tensor], *sources: Any) -> Any:
        if computed := [source.name for source in sources if source.op != "get_attr"]:
            raise LowerError(f"the weights {computed[0]} are computed: expected the model's constants")
        numbers = [int(source.target[1:]) for source in sources]

        def of_experts(*tensors: Tensor) -> Tensor:
            return pack(*(tensor.unsqueeze(0) if is_linear else tensor for tensor in tensors))

        name = f"{sources[0].target}.{part}"
        result = graph.get_attr(name)
        result.meta["val"] = of_experts(*(source.meta["val"] for source in sources))
        made[name] = lambda weights: (of_experts(*(weights[number] for number in numbers)),)
        return result

    out_features, in_features = map(int, weight.meta["val"].shape[-2:])
    if is_call(node, ours.expert_linear.default):
        bias = rest[0] if rest else None
        parts = [packed("floats", pack_float32, weight), None, None, None, None]
    else:
        scales, offsets, offset_scales, bias = (*rest, None, None, None)[:4]
        is_grouped = scales.meta["val"].ndim == weight.meta["val"].ndim
        of_offsets = () if offsets is None else (offsets, offset_scales)
        parts = [
            packed("packed", pack_int4 if is_grouped else pack_int8, weight),
            packed("scales", pack_scales, scales),
            packed("sums", pack_sums, weight, scales, *of_offsets),
            packed("offsets", pack_offsets, offsets) if of_offsets else None,
            packed("offset_scales", pack_scales, offset_scales) if of_offsets else None,
        ]
    operator = ours.linear_packed.default if is_linear else ours.expert_linear_packed.default
    return insert(graph, operator, *rows, *parts, bias, in_features, out_features, like=node)


def _blocks(x: Tensor) -> Tensor:
    """[E, N, …] -> [E, B, 16, …]; zeros behind the last output feature."""
    behind = (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % BLOCK)
    return pad(x, behind).view(x.shape[0], -1, BLOCK, *x.shape[2:])


def pack_float32(weight: Tensor) -> Tensor:
    """float32 [E, N, K] -> [E, B, K, 16]."""
    return _blocks(weight).transpose(2, 3).contiguous()


def pack_int8(weight: Tensor) -> Tensor:
    """int8 [E, N, K] -> bytes [E, B, K/4, 16, 4] that are 128 more; zeros behind the last input feature."""
    rows = _blocks(pad(weight, (0, -weight.shape[2] % 4)))
    quads = rows.view(*rows.shape[:3], -1, 4)
    return torch.bitwise_xor(quads.transpose(2, 3), -128).contiguous()


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
    """float32 [E, N] -> [E, B, 16]; [E, N, G] -> bundles of bfloat16 [B, G, 16], which holds 4-bit weights' scales."""
    blocks = _blocks(scales)
    return blocks if scales.ndim == 2 else _bundles(blocks.transpose(2, 3)).to(torch.bfloat16)


def pack_offsets(offsets: Tensor) -> Tensor:
    """int8 [E, N, G] -> bundles of [B, G/2, 16, 2]; zeros behind the last group."""
    blocks = _blocks(pad(offsets, (0, offsets.shape[2] % 2)))
    return _bundles(blocks.view(*blocks.shape[:3], -1, 2).transpose(2, 3))


def pack_sums(
    weight: Tensor, scales: Tensor, offsets: Tensor | None = None, offset_scales: Tensor | None = None
) -> Tensor:
    """The sum of what each output feature's weights stand for, float32 [E, B, 16].

    The kernel subtracts it, times the number that stands for zero in a row.
    """
    groups = scales.unsqueeze(2) if scales.ndim == 2 else scales
    of_groups = weight.view(*groups.shape, -1).sum(3, dtype=torch.int32)
    sums = (of_groups * groups).sum(2)
    if offsets is not None and offset_scales is not None:
        sums += offsets.sum(2, dtype=torch.int32) * GROUP_SIZE * offset_scales
    return _blocks(sums)
