"""Move what activations have in a few large channels into weights, where rounding to 8 bits feels it less.

An activation's scale is that of its largest channel, and the others are rounded to it. Channels are divided by a factor
where they are made, and the columns of the weights that read them multiplied by it (channels.py), so that nothing is
computed at run time: Xiao et al., "SmoothQuant", 2022. A table that is tied to a head is scaled with it, and its rows
divided again when they are looked up. Knows nothing of backends or recipes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of, output_node
from doubleweave.compiler.quantize.channels import Channels, Place, find_channels
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import SegmentModules, TorchSplit
from doubleweave.compiler.split.transform import copy_graph, over_empty_weights, transform_segments
from doubleweave.compiler.split.weights import Convert, MadeWeights, Weights
from doubleweave.sources.file_weights import FEATURES, computed_rows, in_blocks

aten = torch.ops.aten


class Smoothed(NamedTuple):
    """`importance` is the mean square of what the columns of a weight multiply, [K]."""

    split: TorchSplit
    importance: Mapping[Place, Tensor]


def smoothed(
    torch_split: TorchSplit,
    chunks: Sequence[Tensor],
    grouped: Container[Place] = (),
    unscaled: Container[Place] = (),
    exponent: float = 0.5,
) -> Smoothed:
    """The split with factors moved into its weights, by its activations over chunks of token ids, int64 [1, T] each.

    Columns of weights in `grouped` have one factor in each group, so that a group that lay on a grid still does; those
    in `unscaled` have none. `exponent` is that of activations (of weights it is what is left of 1): 0.5 leaves both as
    large as one another.
    """
    found = find_channels(torch_split) if chunks else []
    if not found:
        return Smoothed(torch_split, {})
    factors: list[Tensor] = []
    importance: dict[Place, Tensor] = {}
    scaled_channels = []
    for channels, columns in zip(found, _columns(torch_split, found, chunks), strict=True):
        if any(place in unscaled for place in channels.readers):
            each = torch.ones(int(channels.of_column.max()) + 1)
        else:
            is_grouped = any(place in grouped for place in channels.readers)
            each = _factors(torch_split, channels, columns.largest, is_grouped, exponent)
            scaled_channels.append(channels)
            factors.append(each)
        mean_square = columns.squares / columns.count / each[channels.of_column].square()
        importance |= dict.fromkeys(channels.readers, mean_square)
    return Smoothed(scaled(torch_split, scaled_channels, factors), importance)


def scaled(torch_split: TorchSplit, found: Sequence[Channels], factors: Sequence[Tensor]) -> TorchSplit:
    """The split whose channels are divided by factors, one a channel, and whose readers' columns are multiplied."""
    rows: dict[Place, Tensor] = {}  # what a weight's rows are divided by
    columns: dict[Place, Tensor] = {}  # what its columns are multiplied by
    tables: dict[Place, Tensor] = {}  # the same of a table
    for channels, each in zip(found, factors, strict=True):
        rows |= dict.fromkeys(channels.makers, each)
        columns |= dict.fromkeys((*channels.readers, *channels.tables), each[channels.of_column])
        tables |= dict.fromkeys(channels.tables, each[channels.of_column])

    def scaling(segment: str) -> Convert:
        def convert(weights: Weights) -> Weights:
            places = [Place(segment, index) for index in range(len(weights))]
            return tuple(
                _scaled(weight, rows.get(place), columns.get(place))
                for place, weight in zip(places, weights, strict=True)
            )

        return convert

    names = {place.segment for place in (*rows, *columns)}
    weights = MadeWeights(torch_split.weights, {name: scaling(name) for name in names})
    return _with_divided_rows(replace(torch_split, weights=weights), tables)


def _factors(
    torch_split: TorchSplit, channels: Channels, activation: Tensor, is_grouped: bool, exponent: float
) -> Tensor:
    """The factor of each channel: that of the largest activation and of the largest weight."""
    weights = torch.zeros_like(activation)
    for place in channels.readers:
        for block in in_blocks(torch_split.weights[place.segment][place.weight], FEATURES):
            weights = torch.maximum(weights, block.abs().amax(dim=0))
    number = _numbers(channels.of_column) if is_grouped else channels.of_column
    count = int(channels.of_column.max()) + 1
    largest = (torch.zeros(count).scatter_reduce_(0, number, each, "amax") for each in (activation, weights))
    activations, columns = largest
    found = activations.pow(exponent) / columns.pow(1 - exponent)
    found = torch.where(found.isfinite() & (found > 0), found, 1.0)
    return torch.empty(count).scatter_(0, channels.of_column, found[number])


def _numbers(of_column: Tensor) -> Tensor:
    """For each column the least channel among those that share a factor with its own: those that a group has columns
    of, and what these share one with."""
    width = len(of_column)
    group = torch.arange(width) // GROUP_SIZE
    number, before = of_column, None
    while before is None or not torch.equal(number, before):
        before = number
        for key in (group, of_column):
            least = torch.full((width,), width).scatter_reduce_(0, key, number, "amin")
            number = least[key]
    return number


def _scaled(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A weight [N, K] or [N], its rows divided and its columns multiplied; one in a file stays there."""

    def scale(numbers: Tensor, some: slice | Tensor) -> Tensor:
        if rows is not None:
            numbers = numbers / (rows[some].unsqueeze(1) if numbers.ndim == 2 else rows[some])
        return numbers if columns is None else numbers * columns

    return weight if rows is None and columns is None else computed_rows(weight, scale)


def _with_divided_rows(torch_split: TorchSplit, tables: Mapping[Place, Tensor]) -> TorchSplit:
    """The split whose rows of tables are divided by factors [K] when they are looked up."""
    for place, factors in tables.items():
        divide = partial(_divided, table=place.weight, factors=factors)
        torch_split = transform_segments(torch_split, divide, frozenset({place.segment}))
    return torch_split


def _divided(graph_module: fx.GraphModule, table: int, factors: Tensor) -> tuple[fx.GraphModule, Convert]:
    graph = copy_graph(graph_module)
    count = len({node.target for node in graph.find_nodes(op="get_attr")})
    for node in nodes_of(graph):
        if is_call(node, aten.embedding.default) and node.args[0].target == f"w{table}":
            with graph.inserting_after(node):
                inverse = graph.get_attr(f"w{count}")
            inverse.meta["val"] = node.meta["val"].new_empty(len(factors))
            with graph.inserting_after(inverse):
                divided = insert(graph, aten.mul.Tensor, node, inverse, like=node)
            node.replace_all_uses_with(divided, delete_user_cb=lambda user, new=divided: user is not new)
    return over_empty_weights(graph), lambda weights: (*weights, 1 / factors)


class _Columns:
    """Of the numbers in each column that readers get, [K] each: the largest magnitude, and the sum of squares."""

    def __init__(self, width: int) -> None:
        self.largest, self.squares, self.count = torch.zeros(width), torch.zeros(width), 0

    def add(self, tensor: Tensor) -> None:
        rows = tensor.detach().flatten(0, -2)
        torch.maximum(self.largest, rows.abs().amax(dim=0), out=self.largest)
        self.squares += rows.square().sum(dim=0)
        self.count += len(rows)


def _columns(torch_split: TorchSplit, found: Sequence[Channels], chunks: Sequence[Tensor]) -> list[_Columns]:
    """Those of the readers of each."""
    columns = [_Columns(len(channels.of_column)) for channels in found]
    by_segment: defaultdict[str, list[tuple[Channels, _Columns]]] = defaultdict(list)
    for channels, each in zip(found, columns, strict=True):
        by_segment[channels.readers[0].segment].append((channels, each))
    inner = {
        name: [channels.node for channels, _ in all_of if channels.port is None]
        for name, all_of in by_segment.items()
    }
    modules = SegmentModules(torch_split, _showing(torch_split, inner))

    def noting(name: str) -> Callable[..., Any]:
        def run(*inputs: Tensor) -> Any:
            *results, shown = modules[name](*inputs)
            nodes = iter(shown)
            for channels, each in by_segment[name]:
                each.add(next(nodes) if channels.port is None else inputs[channels.port])
            return results

        return run

    run: dict[str, Callable[..., Any]] = {
        name: noting(name) if name in by_segment else modules[name] for name in modules
    }
    for _ in run_chunks(torch_split, chunks, run):
        pass
    return columns


def _showing(torch_split: TorchSplit, inner: Mapping[str, Sequence[str]]) -> dict[str, fx.Graph]:
    """The graphs by structure; of segments in `inner` the named nodes are one more result, a list."""
    names = {torch_split.split.segment(segment).structure: nodes for segment, nodes in inner.items()}
    graphs = {}
    for structure, module in torch_split.graphs.items():
        graphs[structure] = module.graph
        if structure in names:
            graphs[structure] = graph = copy_graph(module)
            copied = dict(zip((node.name for node in module.graph.nodes), graph.nodes, strict=True))
            output = output_node(graph)
            output.args = ((*output.args[0], [copied[name] for name in names[structure]]),)
    return graphs
