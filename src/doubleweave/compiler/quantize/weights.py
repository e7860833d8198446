"""Quantize the linears of a split, experts' too: 8-bit dynamic activations with 8-bit or 4-bit weights.

Works on a structure's graph once and on each segment's weights. It knows nothing of backends: it writes
the quantize and dequantize operators of PyTorch's `quantized_decomposed` namespace, which backends read,
and which run in eager torch as well (the numeric reference of a quantized program).

The recipes are named as in torchao: 8da8w is int8 weights with one scale an output feature, 8da4w int4
weights with one scale and one offset for each 32 input features, in operators of our own (graph/linear_ops.py). Both
take int8 activations, asymmetric, one scale a token, chosen at run time. The head keeps 8 bits in 8da4w, as llama.cpp's
Q4_0 does. A linear that experts are chosen by stays float32: it is small, and a rounding that changes a choice changes
all that follows.

Weights that were quantized before keep their integers in 8da4w (grids.py): those around zero without offsets, and in
a file that mixes them those of more bits in 8.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED
from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of
from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.formats import (
    FORMATS,
    INT4,
    INT4_OFFSETS,
    INT8,
    Format,
)
from doubleweave.compiler.quantize.grids import GROUP_SIZE, format_of
from doubleweave.compiler.split import transform
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.weights import Convert, Weights
from doubleweave.errors import PolicyError
from doubleweave.sources.file_weights import FileWeight, in_blocks

RECIPES = ("8da8w", "8da4w", "none")
KEEP_8_BIT = frozenset({"lm_head"})
_PROBED_ROWS = 4
_MOST_4_BIT_COLUMNS = 1 << 16  # kMostInt4Features in native/include/doubleweave/linears.h
_WIDE = "more bits"  # than 4, in the file

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
_EXPERTS = torch.ops.doubleweave.expert_linear.default
_QUANTIZED_EXPERTS = torch.ops.doubleweave.expert_linear_quantized.default

# The formats of a segment's weights that are not its recipe's own, by their index.
Exceptions = tuple[tuple[int, str], ...]
# By segment and index, what weights ask for: a format's name, or _WIDE.
Chosen = dict[str, dict[int, str]]


def quantize(torch_split: TorchSplit, recipe: str) -> TorchSplit:
    """Quantize every linear of every segment; raises PolicyError for a recipe that does not exist."""
    if recipe not in RECIPES:
        raise PolicyError(f"quantize: found {recipe!r}, expected one of {', '.join(RECIPES)}")
    if recipe == "none":
        return torch_split
    usual = _usual(recipe)
    chosen = {} if usual is INT8 else _chosen(torch_split)
    return transform.transform_variants(
        torch_split,
        lambda graph, found: _quantize_graph(graph, usual, found),
        _exceptions(torch_split, usual, chosen),
    )


class Rounding(NamedTuple):
    """What a recipe rounds weights to: those whose columns have one factor in each group, as groups lie on grids that
    it keeps; those whose columns are not scaled at all; and those that are put on grids. `exponent` is how much of what
    activations have in large channels goes into weights: 0.5 leaves both as large as one another.
    """

    grouped: Collection[Place] = ()
    unscaled: Collection[Place] = ()
    free: Collection[Place] = ()
    exponent: float = 0.5


def rounding(torch_split: TorchSplit, recipe: str) -> Rounding | None:
    """Of this file's recipes; None for one that rounds nothing."""
    if recipe == "none":
        return None
    usual = _usual(recipe)
    free: set[Place] = set()
    if usual is INT8:
        return Rounding(grouped=set(), free=free)
    chosen = _chosen(torch_split)
    exceptions, grids = _exceptions(torch_split, usual, chosen), _on_grids(chosen)
    for segment in torch_split.split.segments:
        others = dict(exceptions[segment.name])
        for number in _quantized_weights(torch_split.graphs[segment.structure].graph):
            place = Place(segment.name, number)
            if others.get(number, usual.name) == INT4_OFFSETS.name and place not in grids:
                free.add(place)
    return Rounding(grouped=grids, free=free)


def on_grids(torch_split: TorchSplit) -> set[Place]:
    """The linears' weights whose groups lie on grids of 16 numbers."""
    return _on_grids(_chosen(torch_split))


def _on_grids(chosen: Chosen) -> set[Place]:
    kept = (INT4.name, INT4_OFFSETS.name)
    return {Place(name, number) for name, own in chosen.items() for number in own if own[number] in kept}


def _usual(recipe: str) -> Format:
    return INT8 if recipe == "8da8w" else INT4_OFFSETS


def _exceptions(torch_split: TorchSplit, usual: Format, chosen: Chosen) -> dict[str, Exceptions]:
    """By segment, the weights that another format than the recipe's holds as they are, or better."""
    names = {name for each in chosen.values() for name in each.values()}
    # A file of more bits throughout is a source like one of 16: only beside 4 bits are they there on purpose.
    is_mixed = not names.isdisjoint((INT4.name, INT4_OFFSETS.name))

    def exceptions(own: Mapping[int, str], graph: fx.Graph) -> Exceptions:
        found = {}
        for index in _quantized_weights(graph):
            kept = own.get(index, usual.name)
            if kept == _WIDE:
                kept = INT8.name if is_mixed else usual.name
            found[index] = kept
        return tuple(sorted(item for item in found.items() if item[1] != usual.name))

    return {
        segment.name: exceptions(chosen.get(segment.name, {}), torch_split.graphs[segment.structure].graph)
        for segment in torch_split.split.segments
    }


def _chosen(torch_split: TorchSplit) -> Chosen:
    """The formats that the linears' weights ask for."""
    found: Chosen = {}
    for segment in torch_split.split.segments:
        own, weights = found.setdefault(segment.name, {}), torch_split.weights[segment.name]
        for index in _quantized_weights(torch_split.graphs[segment.structure].graph):
            # Kernels of 4 bits take whole groups, and add up so many products.
            width = int(weights[index].shape[-1])
            if segment.name in KEEP_8_BIT or width % GROUP_SIZE or width > _MOST_4_BIT_COLUMNS:
                own[index] = INT8.name
            elif kept := format_of(_first_rows(weights[index]).reshape(-1, GROUP_SIZE)):
                own[index] = _WIDE if kept == INT8.name else kept
    return found


def _quantized_weights(graph: fx.Graph) -> Iterator[int]:
    """The weights that are quantized, by index."""
    routers = _routers(graph)
    for node in nodes_of(graph):
        if is_call(node, _EXPERTS) and node.args[2].op == "get_attr":
            yield int(node.args[2].target[1:])
        elif is_call(node, aten.linear.default) and node.args[1].op == "get_attr" and node not in routers:
            yield int(node.args[1].target[1:])


def _first_rows(weight: Tensor) -> Tensor:
    """A few rows of a linear's weight [N, K], or of the first expert's of [E, N, K], float32."""
    if isinstance(weight, FileWeight):
        with weight.opened() as saved:
            weight = saved[: _PROBED_ROWS if weight.ndim == 2 else 1].to(torch.float32, copy=True)
    return (weight[0] if weight.ndim == 3 else weight).detach()[:_PROBED_ROWS]


def _quantize_graph(
    graph_module: fx.GraphModule, usual: Format, exceptions: Exceptions
) -> tuple[fx.GraphModule, Convert]:
    graph = transform.copy_graph(graph_module)
    linears = _Linears(graph, {index: FORMATS[name] for index, name in exceptions}, usual)
    routers = _routers(graph)
    for node in nodes_of(graph):
        if is_call(node, _EXPERTS) and node.args[2].op == "get_attr":
            linears.quantize_experts(node)
        elif is_call(node, aten.linear.default) and node.args[1].op == "get_attr" and node not in routers:
            linears.quantize(node)
    return renumbered(graph, linears.formats)


class _Linears:
    """Quantizes the linears of a graph, one after the other; what they read is quantized once for all."""

    def __init__(self, graph: fx.Graph, exceptions: Mapping[int, Format], usual: Format) -> None:
        self._graph, self._exceptions, self._usual = graph, exceptions, usual
        self.formats: dict[int, Format] = {}  # by weight index
        self._activations: dict[Any, Any] = {}

    def quantize(self, node: Any) -> None:
        source, weight, *bias = node.args
        found = self._format(weight)
        with self._graph.inserting_before(node):
            parts = quantized_parts(self._graph, weight, found)
            if found is INT8:
                # q, k and v read the same rows, as do gate and up.
                grid = (0, -127, 127, torch.int8)
                exact = insert(self._graph, qd.dequantize_per_channel.default, *parts, *grid, like=weight)
                node.args = (self._activation(source), exact, *bias)
                return
            made = insert(self._graph, LINEAR_QUANTIZED, source, *_operands(parts, bias), like=node)
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)

    def quantize_experts(self, node: Any) -> None:
        """In place of an expert_linear: the operator takes rows in float32 and rounds them itself."""
        x, index, weight, *bias = node.args
        found = self._format(weight)
        with self._graph.inserting_before(node):
            parts = quantized_parts(self._graph, weight, found)
            parts = parts[:2] if found is INT8 else parts  # zero points are zeros
            made = insert(self._graph, _QUANTIZED_EXPERTS, x, index, *_operands(parts, bias), like=node)
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)

    def _format(self, weight: Any) -> Format:
        index = int(weight.target[1:])
        return self.formats.setdefault(index, self._exceptions.get(index, self._usual))

    def _activation(self, source: Any) -> Any:
        if source not in self._activations:
            self._activations[source] = _dynamic_activation(self._graph, source)
        return self._activations[source]


def _operands(parts: list[Any], bias: list[Any]) -> list[Any]:
    """Of an operator whose weight has values, scales and perhaps offsets and their scales, and perhaps a bias."""
    return [*parts, *[None] * (4 - len(parts)), *bias] if bias else parts


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


def quantized_parts(graph: fx.Graph, weight: Any, into: Format) -> list[Any]:
    """Read a format's parts in the place of a weight, once `renumbered` has counted them."""
    # The nodes have nested names for a while: `renumbered` counts the buffers once all of them are there.
    parts = [graph.get_attr(f"{weight.target}.{part}") for part in into.parts]
    with weight.meta["val"].fake_mode:
        converted = _converted(weight.meta["val"], into)
    for part, tensor in zip(parts, converted, strict=True):
        part.meta["val"] = tensor
    return parts


def _converted(weight: Tensor, into: Format) -> tuple[Tensor, ...]:
    """The parts of a linear's weight [N, K], or of experts' [E, N, K]."""
    if weight.ndim == 2:
        return into.convert(weight)
    # One by one: the search for 4-bit scales takes several times their memory.
    experts = (block[0] for block in in_blocks(weight, 1))
    return tuple(map(torch.stack, zip(*map(into.convert, experts), strict=True)))


def renumbered(graph: fx.Graph, formats: Mapping[int, Format]) -> tuple[fx.GraphModule, Convert]:
    """Name the buffers "w0", "w1", … again, in the order in which the new graph reads them. `formats` are those of the
    weights that are quantized, by index."""
    graph.eliminate_dead_code()
    order = transform.number_weights(graph)

    def convert(weights: Weights) -> Weights:
        parts: dict[str, Tensor] = {}
        for index, tensor in enumerate(weights):
            parts[f"w{index}"] = tensor
            if index in formats:
                found = formats[index]
                names = (f"w{index}.{part}" for part in found.parts)
                parts.update(zip(names, _converted(tensor, found), strict=True))
        return tuple(parts[name] for name in order)

    return transform.over_empty_weights(graph), convert
