"""Quantize the linears of a split, experts' too: 8-bit dynamic activations with 8-bit or 4-bit weights.

Works on a structure's graph once and on each segment's weights. It knows nothing of backends: the operators that it
writes run in eager torch as well (the numeric reference of a quantized program).

The recipes are named as in torchao: 8da8w is int8 weights with one scale for each 64 input features, 8da4w int4 weights
with one scale and one offset for each 32. Both take int8 activations, a scale for each 64 numbers of a row, chosen at
run time (graph/linear_ops.py). The head keeps 8 bits in 8da4w, as llama.cpp's
Q4_0 does. A linear that experts are chosen by stays float32: it is small, and a rounding that changes a choice changes
all that follows.

Weights that were quantized before keep their integers in 8da4w (grids.py): those around zero without offsets, and in
a file that mixes them those of more bits in 8. What somebody asks for (kept.py) counts before all of this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED, LINEAR_ROWS
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
from doubleweave.compiler.quantize.kept import FLOAT32, takes_4_bits
from doubleweave.compiler.quantize.roles import WEIGHT_OF, routers_of
from doubleweave.compiler.split import transform
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.weights import Convert, Weights
from doubleweave.errors import PolicyError
from doubleweave.sources.file_weights import FileWeight, in_blocks

RECIPES = ("8da8w", "8da4w", "none")
KEEP_8_BIT = frozenset({"lm_head"})
_PROBED_ROWS = 4
_TABLE = "table "  # before the format of a table that is a linear's weights too

aten = torch.ops.aten
ours = torch.ops.doubleweave
_QUANTIZED = {
    aten.linear.default: LINEAR_QUANTIZED,
    ours.expert_linear.default: ours.expert_linear_quantized.default,
}

# The formats of a segment's weights that are not its recipe's own, by their index.
Exceptions = tuple[tuple[int, str], ...]
# What weights somebody asked for (kept.py), whatever the recipe says.
Asked = Mapping[Place, str]
NOTHING: Asked = MappingProxyType({})


class Chosen(NamedTuple):
    """What each weight that may be quantized is kept in, by a format's name (or FLOAT32), and those of them that lie on
    grids of 16 numbers."""

    formats: dict[Place, str]
    on_grids: set[Place]


def quantize(torch_split: TorchSplit, recipe: str, asked: Asked = NOTHING) -> TorchSplit:
    """Quantize every linear of every segment; raises PolicyError for a recipe that does not exist."""
    if recipe not in RECIPES:
        raise PolicyError(f"quantize: found {recipe!r}, expected one of {', '.join(RECIPES)}")
    if recipe == "none":
        return torch_split
    usual = _usual(recipe)
    exceptions: dict[str, list[tuple[int, str]]] = {s.name: [] for s in torch_split.split.segments}
    formats = _chosen(torch_split, usual, asked).formats
    for place, name in formats.items():
        if name != usual.name:
            exceptions[place.segment].append((place.weight, name))
    for (segment, table), of_linear in torch_split.tied.items():
        if (name := formats.get(Place(*of_linear), FLOAT32)) != FLOAT32:
            exceptions[segment].append((table, _TABLE + name))
    quantized = transform.transform_variants(
        torch_split,
        lambda graph, found: _quantize_graph(graph, usual, found),
        {name: tuple(sorted(found)) for name, found in exceptions.items()},
    )
    return replace(quantized, tied={})  # weights have other numbers now


class Rounding(NamedTuple):
    """What a recipe rounds weights to: those whose columns have one factor in each group, as groups lie on grids that
    it keeps; those whose columns are not scaled at all; and those that are put on grids. `exponent` is how much of what
    activations have in large channels goes into weights: 0.5 leaves both as large as one another.
    """

    grouped: Collection[Place] = ()
    unscaled: Collection[Place] = ()
    free: Collection[Place] = ()
    exponent: float = 0.5


def rounding(torch_split: TorchSplit, recipe: str, asked: Asked = NOTHING) -> Rounding | None:
    """Of this file's recipes; None for one that rounds nothing."""
    if recipe == "none":
        return None
    formats, grids = _chosen(torch_split, _usual(recipe), asked)
    free = {place for place, name in formats.items() if name == INT4_OFFSETS.name and place not in grids}
    return Rounding(grouped=grids, free=free)


def on_grids(torch_split: TorchSplit) -> set[Place]:
    """The linears' weights whose groups lie on grids of 16 numbers."""
    return _chosen(torch_split, INT4_OFFSETS, NOTHING).on_grids


def _usual(recipe: str) -> Format:
    return INT8 if recipe == "8da8w" else INT4_OFFSETS


def _chosen(torch_split: TorchSplit, usual: Format, asked: Asked) -> Chosen:
    formats, grids, wide = {}, set(), []
    for segment in torch_split.split.segments:
        weights = torch_split.weights[segment.name]
        for index in _quantized_weights(torch_split.graphs[segment.structure].graph):
            place, weight = Place(segment.name, index), weights[index]
            into = asked.get(place)
            if into is None:
                keeps_8 = segment.name in KEEP_8_BIT or not takes_4_bits(weight.shape[-1])
                into = INT8.name if usual is INT8 or keeps_8 else INT4.name
            formats[place] = into
            if into != INT4.name:
                continue
            kept = format_of(_first_rows(weight).reshape(-1, GROUP_SIZE))
            formats[place] = INT4.name if kept == INT4.name else INT4_OFFSETS.name
            if kept in (INT4.name, INT4_OFFSETS.name):
                grids.add(place)
            elif kept == INT8.name and place not in asked:
                wide.append(place)
    # A file of more bits throughout is a source like one of 16: only beside 4 bits are they there on purpose.
    if grids:
        formats.update(dict.fromkeys(wide, INT8.name))
    return Chosen(formats, grids)


def _quantized_weights(graph: fx.Graph) -> Iterator[int]:
    """The weights that may be quantized, by index."""
    routers = routers_of(graph)
    for node in nodes_of(graph):
        if is_call(node, *WEIGHT_OF) and node not in routers:
            weight = node.args[WEIGHT_OF[node.target]]
            if weight.op == "get_attr":
                yield int(weight.target[1:])


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
    stay = {f"w{index}" for index, name in exceptions if name == FLOAT32}
    tables = {f"w{index}" for index, name in exceptions if name.startswith(_TABLE)}
    others = {index: FORMATS[name.removeprefix(_TABLE)] for index, name in exceptions if name != FLOAT32}
    linears = _Linears(graph, others, usual)
    routers = routers_of(graph)
    for node in nodes_of(graph):
        if is_call(node, aten.embedding.default) and node.args[0].target in tables:
            linears.quantize_lookup(node)
        if not is_call(node, *WEIGHT_OF) or node in routers:
            continue
        weight = node.args[WEIGHT_OF[node.target]]
        if weight.op == "get_attr" and weight.target not in stay:
            linears.quantize(node)
    return renumbered(graph, linears.formats)


class _Linears:
    """Quantizes the linears of a graph, one after the other."""

    def __init__(self, graph: fx.Graph, exceptions: Mapping[int, Format], usual: Format) -> None:
        self._graph, self._exceptions, self._usual = graph, exceptions, usual
        self.formats: dict[int, Format] = {}  # by weight index

    def quantize(self, node: Any) -> None:
        """A linear, or experts': the operator takes rows in float32 and rounds them itself."""
        at = WEIGHT_OF[node.target]
        given, weight, bias = node.args[:at], node.args[at], list(node.args[at + 1 :])
        with self._graph.inserting_before(node):
            parts = self._parts(weight)
            made = insert(self._graph, _QUANTIZED[node.target], *given, *_operands(parts, bias), like=node)
        self._replace(node, made)

    def quantize_lookup(self, node: Any) -> None:
        """An embedding whose table is a linear's weights too."""
        table, index = node.args[:2]
        with self._graph.inserting_before(node):
            values, scales, *offsets = (*self._parts(table), None, None)[:4]
            width = int(node.meta["val"].shape[-1])
            made = insert(self._graph, LINEAR_ROWS, index, values, scales, *offsets, width, like=node)
        self._replace(node, made)

    def _replace(self, node: Any, made: Any) -> None:
        node.replace_all_uses_with(made)
        self._graph.erase_node(node)

    def _parts(self, weight: Any) -> list[Any]:
        return quantized_parts(self._graph, weight, self._format(weight))

    def _format(self, weight: Any) -> Format:
        index = int(weight.target[1:])
        return self.formats.setdefault(index, self._exceptions.get(index, self._usual))


def _operands(parts: list[Any], bias: list[Any]) -> list[Any]:
    """Of an operator whose weight has values, scales and perhaps offsets and their scales, and perhaps a bias."""
    return [*parts, *[None] * (4 - len(parts)), *bias] if bias else parts


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
