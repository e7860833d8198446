"""Quantize the linears of a split, experts' too: 8-bit dynamic activations with 8-bit or 4-bit weights.

Works on a structure's graph once and on each segment's weights. It knows nothing of backends: it writes
the quantize and dequantize operators of PyTorch's `quantized_decomposed` namespace, which backends read,
and which run in eager torch as well (the numeric reference of a quantized program).

The recipes are named as in torchao: 8da8w is int8 weights with one scale an output feature, 8da4w int4
weights with one scale for each 32 input features. Both take int8 activations, asymmetric, one scale a
token, chosen at run time. The head keeps 8 bits in 8da4w, as llama.cpp's Q4_0 does. A linear that experts are chosen by
stays float32: it is small, and a rounding that changes a choice changes all that follows.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of
from doubleweave.compiler.split import transform
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.weights import Convert, Weights
from doubleweave.errors import PolicyError
from doubleweave.sources.file_weights import FileWeight

RECIPES = ("8da8w", "8da4w", "none")
GROUP_SIZE = 32
# The steps from zero to a group's largest magnitude. Int4 reaches -8 … 7: more than 7 may cut that weight off, and a
# finer grid for the 31 others can be worth it.
_SCALE_STEPS = (7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5)
# Numbers that are converted at a time: what is computed on the way stays in the processor's cache, where memory for
# whole weights would be mapped and given back at every step (ten times as long for 4 bits).
_NUMBERS = 1 << 19
_LEAST_SCALE = 2.0**-100  # XNNPACK refuses scales that are zero or subnormal
KEEP_8_BIT = frozenset({"lm_head"})
# Of a quantized weight, in the order of the operators' arguments.
_PARTS = ("values", "scales", "zero_points")

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
_EXPERTS = torch.ops.doubleweave.expert_linear.default
_QUANTIZED_EXPERTS = torch.ops.doubleweave.expert_linear_quantized.default


def quantize(torch_split: TorchSplit, recipe: str) -> TorchSplit:
    """Quantize every linear of every segment; raises PolicyError for a recipe that does not exist."""
    if recipe not in RECIPES:
        raise PolicyError(f"quantize: found {recipe!r}, expected one of {', '.join(RECIPES)}")
    if recipe == "none":
        return torch_split
    names = frozenset(s.name for s in torch_split.split.segments)
    narrow = names - KEEP_8_BIT if recipe == "8da4w" else frozenset()
    wide = transform.transform_segments(
        torch_split, lambda graph: _quantize_graph(graph, bits=8), names - narrow
    )
    return transform.transform_segments(wide, lambda graph: _quantize_graph(graph, bits=4), narrow)


def _by_rows(convert: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The same conversion of a weight [N, K], a few rows at a time."""

    @functools.wraps(convert)
    def converted(weight: Tensor) -> tuple[Tensor, ...]:
        weight = weight.detach()
        rows = max(1, _NUMBERS // weight.shape[1])
        if len(weight) <= rows or isinstance(weight, FakeTensor):
            return convert(weight)
        blocks = weight.blocks(rows) if isinstance(weight, FileWeight) else torch.split(weight, rows)
        made: tuple[Tensor, ...] = ()
        start = 0
        for block in blocks:
            parts = convert(block)
            # All of it at once: parts that stay, between memory that is given back, would keep the heap from shrinking.
            made = made or tuple(part.new_empty(len(weight), *part.shape[1:]) for part in parts)
            for whole, part in zip(made, parts, strict=True):
                whole[start : start + len(part)] = part
            start += len(block)
        return made

    return converted


@_by_rows
def int8_per_channel(weight: Tensor) -> tuple[Tensor, ...]:
    """float32 [N, K] -> (int8 [N, K] in -127 … 127, scales float32 [N], zero points int64 [N])."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=_LEAST_SCALE)
    rounded = torch.round(weight / scales.unsqueeze(1)).clamp(-127, 127).to(torch.int8)
    return rounded, scales, torch.zeros(len(scales), dtype=torch.int64)


@_by_rows
def int4_per_group(weight: Tensor) -> tuple[Tensor, ...]:
    """float32 [N, K] -> (int8 [N, K] in -8 … 7, scales float32 [N, K/32], zero points int32 [N, K/32]).

    Each group takes, of a few scales around its largest magnitude, the one with the least squared error;
    scales are rounded to bfloat16, the type in which XNNPACK keeps them.
    """
    groups = weight.view(weight.shape[0], -1, GROUP_SIZE)
    largest = groups.abs().amax(dim=2, keepdim=True)
    best_error = torch.full_like(largest, torch.inf)
    best_scales, found = torch.empty_like(largest), torch.empty_like(groups)
    for steps in _SCALE_STEPS:
        scales = (largest / steps).clamp_(min=_LEAST_SCALE).to(torch.bfloat16).to(torch.float32)
        torch.div(groups, scales, out=found).round_().clamp_(-8, 7)
        error = found.mul_(scales).sub_(groups).square_().sum(dim=2, keepdim=True)
        torch.where(error < best_error, scales, best_scales, out=best_scales)
        torch.minimum(error, best_error, out=best_error)
    torch.div(groups, best_scales, out=found).round_().clamp_(-8, 7)
    scales = best_scales.squeeze(2)
    return found.to(torch.int8).view(weight.shape), scales, torch.zeros(scales.shape, dtype=torch.int32)


def _quantize_graph(graph_module: fx.GraphModule, bits: int) -> tuple[fx.GraphModule, Convert]:
    graph = transform.copy_graph(graph_module)
    quantized: dict[int, int] = {}  # weight index -> bits
    activations: dict[Any, Any] = {}
    routers = _routers(graph)
    for node in nodes_of(graph):
        if is_call(node, _EXPERTS) and node.args[2].op == "get_attr":
            _quantize_experts(graph, node, bits, quantized)
            continue
        if not is_call(node, aten.linear.default) or node.args[1].op != "get_attr" or node in routers:
            continue
        source, weight = node.args[:2]
        index = int(weight.target[1:])
        quantized[index] = _bits_of(weight, bits)
        with graph.inserting_before(node):
            if source not in activations:  # q, k and v read the same rows, as do gate and up: quantized once
                activations[source] = _dynamic_activation(graph, source)
            dequantized = _dequantized_weight(graph, weight, quantized[index])
        node.args = (activations[source], dequantized, *node.args[2:])
    return renumbered(graph, quantized)


def _bits_of(weight: Any, bits: int) -> int:
    # A width that groups do not divide keeps 8 bits: 4-bit kernels take whole groups.
    return bits if bits == 8 or int(weight.meta["val"].shape[-1]) % GROUP_SIZE == 0 else 8


def _quantize_experts(graph: fx.Graph, node: Any, bits: int, quantized: dict[int, int]) -> None:
    """In place of an expert_linear: the operator takes rows in float32 and rounds them itself."""
    x, index, weight, *bias = node.args
    number = int(weight.target[1:])
    quantized[number] = _bits_of(weight, bits)
    with graph.inserting_before(node):
        values, scales, _ = quantized_parts(graph, weight, quantized[number])
        made = insert(graph, _QUANTIZED_EXPERTS, x, index, values, scales, *bias, like=node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _routers(graph: fx.Graph) -> set[Any]:
    """The linears that experts are chosen by."""
    found: set[Any] = set()
    todo = [node.args[1] for node in nodes_of(graph) if is_call(node, _EXPERTS)]
    seen = set(todo)
    for node in todo:
        if is_call(node, aten.linear.default):
            found.add(node)
            continue
        sources = [source for source in node.all_input_nodes if source not in seen]
        seen.update(sources)
        todo += sources
    return found


def _dynamic_activation(graph: fx.Graph, x: Any) -> Any:
    chosen = insert(graph, qd.choose_qparams_per_token_asymmetric.default, x, torch.int8, like=x)
    scale = insert(graph, operator.getitem, chosen, 0, like=x)
    zero_point = insert(graph, operator.getitem, chosen, 1, like=x)
    grid = (scale, zero_point, -128, 127, torch.int8)
    int8 = insert(graph, qd.quantize_per_token.default, x, *grid, like=x)
    return insert(graph, qd.dequantize_per_token.default, int8, *grid, torch.float32, like=x)


def quantized_parts(graph: fx.Graph, weight: Any, bits: int) -> list[Any]:
    """Read values, scales and zero points in the place of a weight, once `renumbered` has counted them."""
    # The nodes have nested names for a while: `renumbered` counts the buffers once all of them are there.
    parts = [graph.get_attr(f"{weight.target}.{part}") for part in _PARTS]
    mode = weight.meta["val"].fake_mode
    with mode:
        converted = _converted(weight.meta["val"], bits)
    for part, tensor in zip(parts, converted, strict=True):
        part.meta["val"] = tensor
    return parts


def _dequantized_weight(graph: fx.Graph, weight: Any, bits: int) -> Any:
    parts = quantized_parts(graph, weight, bits)
    if bits == 8:
        return insert(graph, qd.dequantize_per_channel.default, *parts, 0, -127, 127, torch.int8, like=weight)
    grid = (-8, 7, torch.int8, GROUP_SIZE, torch.float32)
    return insert(graph, qd.dequantize_per_channel_group.default, *parts, *grid, like=weight)


_CONVERT = {8: int8_per_channel, 4: int4_per_group}


def _converted(weight: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The parts of a linear's weight [N, K], or of experts' [E, N, K]."""
    if weight.ndim == 2:
        return _CONVERT[bits](weight)
    # One by one: the search for 4-bit scales takes several times their memory.
    experts = (e[0] for e in weight.blocks(1)) if isinstance(weight, FileWeight) else weight.unbind()
    return tuple(map(torch.stack, zip(*(_CONVERT[bits](each) for each in experts), strict=True)))


def renumbered(graph: fx.Graph, quantized: dict[int, int]) -> tuple[fx.GraphModule, Convert]:
    """Name the buffers "w0", "w1", … again, in the order in which the new graph reads them. `quantized` has the bits of
    the weights by index."""
    graph.eliminate_dead_code()
    order = transform.number_weights(graph)

    def convert(weights: Weights) -> Weights:
        parts: dict[str, Tensor] = {}
        for index, tensor in enumerate(weights):
            parts[f"w{index}"] = tensor
            if index in quantized:
                names = (f"w{index}.{part}" for part in _PARTS)
                parts.update(zip(names, _converted(tensor, quantized[index]), strict=True))
        return tuple(parts[name] for name in order)

    return transform.over_empty_weights(graph), convert
