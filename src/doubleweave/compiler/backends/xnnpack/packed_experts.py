"""Put the weights of experts into the order in which the kernel on the CPU reads them.

The kernel (native/include/doubleweave/experts.h) reads them where they lie in the program's file, so that nothing is
read of the experts that nobody chooses: they are packed here, not when the program is loaded.

Shape legend: E experts, N output features, K input features, G groups of 32 of them, B blocks of 16 output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of
from doubleweave.compiler.split.transform import copy_graph, number_weights, over_empty_weights
from doubleweave.compiler.split.weights import Convert, Weights
from doubleweave.errors import LowerError

ours = torch.ops.doubleweave

BLOCK = 16


def with_packed_experts(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """A structure that calls `expert_linear_packed`, and what it does to a segment's weights."""
    graph = copy_graph(graph_module)
    made: dict[str, Convert] = {}  # new weights, by name: each from a segment's weights
    for node in nodes_of(graph):
        if is_call(node, ours.expert_linear.default, ours.expert_linear_quantized.default):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_packed(graph, node, made))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    names = number_weights(graph)

    def convert(weights: Weights) -> Weights:
        return tuple(made[name](weights)[0] if name in made else weights[int(name[1:])] for name in names)

    return over_empty_weights(graph), convert


def _packed(graph: fx.Graph, node: Any, made: dict[str, Convert]) -> Any:
    def packed(part: str, pack: Callable[..., Tensor], *sources: Any) -> Any:
        if computed := [source.name for source in sources if source.op != "get_attr"]:
            raise LowerError(
                f"the experts' weights {computed[0]} are computed: expected the model's constants"
            )
        numbers = [int(source.target[1:]) for source in sources]
        name = f"{sources[0].target}.{part}"
        result = graph.get_attr(name)
        result.meta["val"] = pack(*(source.meta["val"] for source in sources))
        made[name] = lambda weights: (pack(*(weights[number] for number in numbers)),)
        return result

    x, index, weight, *rest = node.args
    _, out_features, in_features = map(int, weight.meta["val"].shape)
    if is_call(node, ours.expert_linear.default):
        parts = [packed("floats", pack_float32, weight), None, None]
    else:
        scales = rest.pop(0)
        is_grouped = scales.meta["val"].ndim == 3
        parts = [
            packed("packed", pack_int4 if is_grouped else pack_int8, weight),
            packed("scales", pack_scales, scales),
            packed("sums", pack_sums, weight, scales),
        ]
    bias = rest[0] if rest else None
    return insert(
        graph,
        ours.expert_linear_packed.default,
        *(x, index, *parts, bias, in_features, out_features),
        like=node,
    )


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
    """int8 [E, N, K] in -8 … 7 -> bytes [E, B, K/8, 16, 4] with two weights each, which are 8 more.

    Of eight input features the first four are in the low halves, the others in the high ones.
    """
    rows = _blocks(weight) + 8
    low, high = rows.view(*rows.shape[:3], -1, 2, 4).transpose(2, 3).unbind(4)
    return torch.bitwise_or(low, torch.bitwise_left_shift(high, 4)).contiguous()


def pack_scales(scales: Tensor) -> Tensor:
    """float32 [E, N] -> [E, B, 16]; [E, N, G] -> bfloat16 [E, B, G, 16], which holds 4-bit weights' scales exactly."""
    blocks = _blocks(scales)
    return blocks if scales.ndim == 2 else blocks.transpose(2, 3).contiguous().to(torch.bfloat16)


def pack_sums(weight: Tensor, scales: Tensor) -> Tensor:
    """The sum of each output feature's weights times scales, float32 [E, B, 16].

    The kernel subtracts it, times the number that stands for zero in a row.
    """
    groups = scales.unsqueeze(2) if scales.ndim == 2 else scales
    of_groups = weight.view(*groups.shape, -1).sum(3, dtype=torch.int32)
    return _blocks((of_groups * groups).sum(2))
