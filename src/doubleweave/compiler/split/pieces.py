"""Split an exported graph into pieces: each becomes a segment, or is a call of a named module.

The level of a node is the largest level of its inputs, plus one where an edge leaves a piece that has an owner.
Nodes of one (level, owner) form a piece, so modules on different devices never merge. A piece's own graph reads
its weights from buffers; pieces of one structure share one graph and differ in their weights alone.

This module knows nothing of language models, policies, quantization or backends: its callers say who owns a node.
"""

from __future__ import annotations

import hashlib
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.edges import Edges
from doubleweave.compiler.graph.nodes import IN_ORDER, PAST, TOGETHER, constant, is_tensor
from doubleweave.errors import SplitError
from doubleweave.ir.split import Port, Segment, Split

# Tensors of fewer bytes cannot be told apart by their bytes (templates.py): they are part of the structure.
SMALL_BYTES = 16


@dataclass(frozen=True)
class TorchSplit:
    """A Split with a graph per structure and weights per segment, which compiling it needs.

    A structure's GraphModule takes the segment's inputs and reads its weights from buffers "w0", "w1", …;
    `weights[segment]` holds that segment's own tensors in this order. `encoded` has what a language model's encoder
    gave for an example, [1, E, …] for each "encoded" value: what the split is run over in eager torch. `tied` says of
    tables that are linears' weights too, as (segment, number), of which.
    """

    split: Split
    graphs: dict[str, fx.GraphModule]
    weights: Mapping[str, tuple[Tensor, ...]]
    encoded: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[tuple[str, int], tuple[str, int]] = field(default_factory=dict)

    def module(self, segment: Segment | str) -> fx.GraphModule:
        """The segment as a module with its own weights (structures are shared, so this is a copy)."""
        found = self.split.segment(segment) if isinstance(segment, str) else segment
        return with_weights(self.graphs[found.structure].graph, self.weights[found.name])


def weight_bytes(torch_split: TorchSplit) -> dict[str, int]:
    """The bytes of each segment's weights, by the shapes in its structure's graph."""
    graphs = torch_split.graphs.items()
    sizes = {structure: sum(buffer.nbytes for buffer in graph.buffers()) for structure, graph in graphs}
    return {segment.name: sizes[segment.structure] for segment in torch_split.split.segments}


class SegmentModules(Mapping[str, Callable[..., Any]]):
    """The segments of a split as functions; their weights are made for a call, unless they are kept.

    `graphs` are other graphs of the structures than the split's own.
    """

    def __init__(self, torch_split: TorchSplit, graphs: Mapping[str, fx.Graph] | None = None) -> None:
        self._split = torch_split
        self.graphs = graphs or {name: module.graph for name, module in torch_split.graphs.items()}
        self._structures = {segment.name: segment.structure for segment in torch_split.split.segments}
        self._modules: dict[str, fx.GraphModule] = {}  # by structure

    def __getitem__(self, name: str) -> Callable[..., Any]:
        structure = self._structures[name]
        if structure not in self._modules:
            graph = self.graphs[structure]
            num_weights = len({node.target for node in graph.find_nodes(op="get_attr")})
            self._modules[structure] = with_weights(graph, (torch.empty(0),) * num_weights)
        return partial(_run_over, self._modules[structure], self._split.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._structures)

    def __len__(self) -> int:
        return len(self._structures)


def _run_over(module: fx.GraphModule, weights: tuple[Tensor, ...], *inputs: Tensor) -> Any:
    # One module for all segments of a structure: a module holds itself, so that a segment's weights would stay in
    # memory until the next collection.
    module._buffers.update((f"w{index}", tensor) for index, tensor in enumerate(weights))
    try:
        return module(*inputs)
    finally:
        module._buffers.clear()


def with_weights(graph: fx.Graph, weights: tuple[Tensor, ...]) -> fx.GraphModule:
    """A structure's graph over these weights."""
    root = torch.nn.Module()
    for index, tensor in enumerate(weights):
        root.register_buffer(f"w{index}", tensor)
    return fx.GraphModule(root, graph)


@dataclass(frozen=True)
class Piece:
    """Nodes of one (level, owner), in the graph's order; `reads` and `writes` are the nodes at its edge."""

    owner: str
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]


def cut_pieces(
    graph: fx.Graph,
    owner_of: Callable[[fx.Node], str],
    absorbing: frozenset[str] = frozenset(),
    late: Set[fx.Node] = frozenset(),
) -> list[Piece]:
    """Cut a graph into pieces, in an order that can run.

    `owner_of` names the owner of a node, "" for none. A node without an owner that reads nothing but results of an
    owner in `absorbing` joins that owner, as Gemma's soft cap behind the head does. Nodes in `late` without an owner
    join the first piece that reads them.
    """
    keys = _settled_keys(graph, owner_of, absorbing)
    _delay(keys, late)
    # Equal levels merge what may run together into few, large segments: each costs a method and a hand-over.
    nodes: dict[tuple[int, str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in keys and _is_computation(node):
            nodes[keys[node]].append(node)
    # At one level, nodes without an owner feed those with one.
    order = sorted(nodes, key=lambda key: (key[0], key[1] != "", key[1]))
    pieces = []
    for key in order:
        members = set(nodes[key])
        writes = tuple(
            node
            for node in nodes[key]
            if is_tensor(node)
            and any(u.op == "output" or (_is_computation(u) and u not in members) for u in _users(node))
        )
        pieces.append(Piece(key[1], tuple(nodes[key]), tuple(_reads(nodes[key], members)), writes))
    return pieces


def _is_computation(node: fx.Node) -> bool:
    """Whether a node computes tensors (one or several); sizes are computed again where they are needed."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return node.op == "call_function" and any(isinstance(v, Tensor) for v in values)


def _settled_keys(
    graph: fx.Graph, owner_of: Callable[[fx.Node], str], absorbing: frozenset[str]
) -> dict[fx.Node, tuple[int, str]]:
    """(level, owner) of each node. What is marked to be one piece has the highest level that one of its nodes needs."""
    least: dict[str, int] = {}
    while True:
        keys = _keys(graph, owner_of, absorbing, least)
        needed: dict[str, int] = defaultdict(int)
        for node, (level, _) in keys.items():
            if (name := node.meta.get(TOGETHER)) is not None:
                needed[name] = max(needed[name], level)
        if needed == least:
            return keys
        least = needed


def _keys(
    graph: fx.Graph,
    owner_of: Callable[[fx.Node], str],
    absorbing: frozenset[str],
    least: Mapping[str, int],
) -> dict[fx.Node, tuple[int, str]]:
    """One pass: `least` has the level of pieces that are marked, as the pass before found it."""
    keys: dict[fx.Node, tuple[int, str]] = {}
    before: fx.Node | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        # Rows of earlier chunks are read by the piece that appends to them, so they stand for its own results.
        sources = (source.meta.get(PAST, source) for source in node.all_input_nodes)
        inputs = [keys[source] for source in sources if source in keys]
        if node.meta.get(IN_ORDER):
            # Calls that share a state run in the order of the graph, though no value passes between them.
            inputs += [keys[before]] if before is not None else []
            before = node
        if not _is_computation(node):
            if inputs:  # a size: it comes from where its tensor does
                keys[node] = max(inputs)
            continue
        if node.target is operator.getitem:
            keys[node] = keys[node.args[0]]
            continue
        owner = owner_of(node)
        if not owner and inputs and len({name for _, name in inputs}) == 1 and inputs[0][1] in absorbing:
            owner = inputs[0][1]
        level = max((level + (name not in ("", owner)) for level, name in inputs), default=0)
        keys[node] = max(level, least.get(node.meta.get(TOGETHER, ""), 0)), owner
    return keys


def _delay(keys: dict[fx.Node, tuple[int, str]], late: Set[fx.Node]) -> None:
    """Move nodes without an owner to the level of their first reader: each layer's own angles to that layer."""
    for node in reversed(list(keys)):  # readers before what they read
        if node in late and keys[node][1] == "":
            levels = [keys[user][0] for user in _users(node) if user in keys]
            keys[node] = (min(levels, default=keys[node][0]), "")


def _users(node: fx.Node) -> list[fx.Node]:
    """Users of a tensor, and of sizes taken from it."""
    found: list[fx.Node] = []
    for user in node.users:
        found += [user] if user.op == "output" or _is_computation(user) else _users(user)
    return found


def _reads(nodes: Sequence[fx.Node], members: set[fx.Node]) -> list[fx.Node]:
    reads: list[fx.Node] = []
    todo = list(nodes)
    for node in todo:  # sizes come behind the nodes
        # A size that a tensor read here has needs nothing more; any other is computed again from its own inputs.
        if node not in members and _same_size(node, reads) is not None:
            continue
        for source in node.all_input_nodes:
            if source in members:
                continue
            if not is_tensor(source):
                todo.append(source)
            elif source.op != "get_attr" and source not in reads:
                reads.append(source)
    return reads


def _same_size(size: fx.Node, tensors: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """The first (tensor, axis) of this size."""
    wanted = str(size.meta["val"])
    shapes = ((tensor, map(str, tensor.meta["val"].shape)) for tensor in tensors)
    return next(
        ((t, axis) for t, shape in shapes for axis, found in enumerate(shape) if found == wanted), None
    )


def extract(
    piece: Piece, reads: Sequence[fx.Node], graph_module: fx.GraphModule, edges: Edges | None = None
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Copy a piece of `graph_module` into a graph of its own, with its weights.

    `reads` are the piece's reads in the order of the new graph's inputs. Sizes are taken again from the inputs. Values
    go in and out in the form of `edges`, or as they are.
    Raises SplitError where a node needs a tensor that is not among `reads`.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    weights: list[fx.Node] = []
    for index, node in enumerate(reads):
        copied[node] = graph.placeholder(f"in{index}")
        copied[node].meta["val"] = node.meta["val"]
    if edges is not None:
        for node in reads:
            copied[node] = edges.inside(graph, copied[node], node)

    def copy(node: fx.Node) -> fx.Node:
        result = graph.node_copy(node, resolve)
        # Names that follow from the piece alone: segments of one structure then have equal graphs, names included.
        result.name = graph._graph_namespace.create_name(getattr(node.target, "__name__", "op"), result)
        return result

    def size_of(node: fx.Node) -> fx.Node:
        # Symbols belong to the whole graph; a segment is exported alone and must find each size in its own inputs.
        found = _same_size(node, reads)
        if found is None:
            for source in node.all_input_nodes:
                resolve(source)
            return copy(node)
        tensor, axis = found
        result = graph.call_function(torch.ops.aten.sym_size.int, (copied[tensor], axis))
        result.meta["val"] = node.meta["val"]
        return result

    def resolve(node: fx.Node) -> fx.Node:
        if node not in copied:
            if node.op == "get_attr":
                copied[node] = graph.get_attr(f"w{len(weights)}")
                copied[node].meta["val"] = node.meta["val"]
                weights.append(node)
            elif not _is_computation(node):
                copied[node] = size_of(node)
            else:
                raise SplitError(f"{node.name} is needed by a segment that does not read it")
        return copied[node]

    for node in piece.nodes:
        for source in node.all_input_nodes:
            resolve(source)
        copied[node] = copy(node)
    writes = (copied[node] for node in piece.writes)
    if edges is not None:
        writes = (edges.outside(graph, copied[node], node) for node in piece.writes)
    graph.output(tuple(writes))
    graph.eliminate_dead_code()
    tensors = tuple(constant(graph_module, node) for node in weights)
    return with_weights(graph, tensors), tensors


def derived_structure(name: str, what: object) -> str:
    """The name of the structure that a pass makes of another: the same for the same `what`."""
    return hashlib.sha256(f"{name} {what}".encode()).hexdigest()[:16]


def structure(graph: fx.Graph, weights: tuple[Tensor, ...], ports: tuple[Port, ...]) -> str:
    """A digest of graph, ports and weights, without the numbers of weights of 16 bytes and more."""
    numbers = [w.tolist() if w.numel() * w.element_size() < SMALL_BYTES else None for w in weights]
    shapes = [(p.dtype, p.shape) for p in ports], [(w.dtype, tuple(w.shape)) for w in weights]
    lines = [*map(str, shapes), str(numbers)]
    index = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
        # A function's own text has its address.
        target = node.target.__qualname__ if isinstance(node.target, FunctionType) else node.target
        lines.append(f"{node.op} {target} {args}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
