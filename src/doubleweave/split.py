"""Split an exported graph into segments, calls and values.

The level of a node is the largest level of its inputs, plus one where an edge leaves a segment that the
policy names. Nodes of one (level, owner) form a segment, so modules on different devices never merge.
Segments of the same structure share one graph and differ in their weights alone.

This module knows nothing of language models, quantization or backends: what it needs of the policy is
which module owns which segment and which operator is a segment of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave import ops as _ops  # noqa: F401  registers doubleweave::attention
from doubleweave.errors import InputError, SplitError
from doubleweave.ir import Call, Dynamic, Port, Segment, Shape, Split, Static, Value
from doubleweave.simplify import constant

ATTENTION = torch.ops.doubleweave.attention.default

_Key = tuple[int, str]


@dataclass(frozen=True)
class TorchSplit:
    """A Split with what compiling it needs: a graph per structure, tensors per segment.

    A structure's GraphModule takes the segment's inputs and reads its weights from buffers "w0", "w1", …;
    `weights[segment]` holds that segment's own tensors in this order.
    """

    split: Split
    graphs: dict[str, fx.GraphModule]
    weights: dict[str, tuple[Tensor, ...]]

    def module(self, segment: str) -> fx.GraphModule:
        """The segment as a module with its own weights (structures are shared, so this is a copy)."""
        return with_weights(self.graphs[self.split.segment(segment).structure].graph, self.weights[segment])


def with_weights(graph: fx.Graph, weights: tuple[Tensor, ...]) -> fx.GraphModule:
    """A structure's graph over these weights."""
    root = torch.nn.Module()
    for index, tensor in enumerate(weights):
        root.register_buffer(f"w{index}", tensor)
    return fx.GraphModule(root, graph)


def split_graph(
    graph_module: fx.GraphModule,
    owners: Mapping[str, str],
    *,
    last_row: frozenset[str] = frozenset(),
    static: Static | Dynamic,
    max_context: int,
    backend: str,
    static_device: str,
) -> TorchSplit:
    """Split a simplified graph.

    `owners` maps qualified module names to segment names; `last_row` names the segments of which
    generation wants the last row only. Attention becomes dynamic CPU segments; everything else gets the
    shape `static` (fixed sizes, or bounded rows) on `static_device`.
    """
    keys = _assign(graph_module.graph, owners)
    builder = _Builder(graph_module, keys)
    segments: dict[str, Segment] = {}
    graphs: dict[str, fx.GraphModule] = {}
    weights: dict[str, tuple[Tensor, ...]] = {}
    calls: list[Call] = []
    by_structure: dict[tuple[str, str], str] = {}
    for key in builder.order:
        piece = builder.piece(key)
        is_attention = piece.is_attention
        name = piece.name
        if is_attention:
            # Attention has no weights: equal parameters are one segment, called once a layer.
            name = by_structure.setdefault(("attention", piece.structure), _attention_name(piece, segments))
        if name not in segments:
            segments[name] = Segment(
                name=name,
                device="cpu" if is_attention else static_device,
                backend="portable" if is_attention else backend,
                shape=_shape(name, is_attention, static, last_row, max_context),
                inputs=piece.inputs,
                outputs=piece.outputs,
                structure=piece.structure,
            )
            weights[name] = piece.weights
            graphs.setdefault(piece.structure, piece.graph_module)
        calls.append(Call(piece.name, name, piece.reads, piece.writes, "last" if name in last_row else "all"))
    split = Split(tuple(segments.values()), tuple(calls), tuple(builder.values.values()))
    return TorchSplit(split, graphs, weights)


def _shape(
    name: str, is_attention: bool, static: Static | Dynamic, last_row: frozenset[str], max_context: int
) -> Static | Dynamic:
    if is_attention:
        most = max(static.sizes) if isinstance(static, Static) else static.high
        return Dynamic(1, most, max_context)
    if isinstance(static, Static) and name in last_row:
        return Static(tuple(sorted({1, *static.sizes})))
    return static


def _attention_name(piece: _Piece, segments: Mapping[str, Segment]) -> str:
    window = next(n for n in piece.graph_module.graph.nodes if n.target is ATTENTION).args[6]
    name = f"attention_window{window}" if window else "attention"
    taken = sum(existing == name or existing.startswith(f"{name}.") for existing in segments)
    return f"{name}.{taken}" if taken else name


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _owner(node: fx.Node, owners: Mapping[str, str]) -> str:
    if node.target is ATTENTION:
        return "attention"
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        # A module called twice is listed as name@1.
        if (name := owners.get(re.sub(r"@\d+", "", path))) is not None:
            return name
    return ""


def _assign(graph: fx.Graph, owners: Mapping[str, str]) -> dict[fx.Node, _Key]:
    """(level, owner) of each tensor computation; glue behind an owned last segment joins it."""
    keys: dict[fx.Node, _Key] = {}
    terminal = set(owners.values()) - {_owner(n, owners) for n in graph.nodes if n.op == "call_function"}
    if terminal:
        raise SplitError(f"no operator of the exported graph belongs to {sorted(terminal)}")
    for node in graph.nodes:
        if node.op != "call_function" or not _is_tensor(node):
            continue
        owner = _owner(node, owners)
        inputs = [keys[n] for n in node.all_input_nodes if n in keys]
        if not owner and inputs and {name for _, name in inputs} == {"lm_head"}:
            owner = "lm_head"
        level = max((lv + (name not in ("", owner)) for lv, name in inputs), default=0)
        if owner == "attention":
            level = max((lv + (name != "") for lv, name in inputs), default=0)
        keys[node] = (level, owner)
    return keys


@dataclass(frozen=True)
class _Piece:
    name: str
    graph_module: fx.GraphModule
    structure: str
    weights: tuple[Tensor, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    is_attention: bool


class _Builder:
    """Builds each segment's own graph and the values between them, in an order that can run."""

    def __init__(self, graph_module: fx.GraphModule, keys: dict[fx.Node, _Key]) -> None:
        self.graph_module = graph_module
        self.keys = keys
        self.nodes: dict[_Key, list[fx.Node]] = defaultdict(list)
        for node, key in keys.items():
            self.nodes[key].append(node)
        self.order = sorted(self.nodes, key=lambda key: (key[0], self._rank(key)))
        self.names = self._names()
        self.values: dict[str, Value] = {}
        self.value_of: dict[fx.Node, str] = {}
        self.symbols: dict[str, str] = {}
        self.outputs = [n for n in _output_node(graph_module.graph).all_input_nodes if _is_tensor(n)]
        for node in graph_module.graph.nodes:
            if node.op == "placeholder" and node.users:
                self._add_value(node, str(node.target), "input")
        self._name_values()

    def _rank(self, key: _Key) -> tuple[int, str]:
        # At one level glue feeds what it surrounds; segments fed by inputs alone come first.
        level, owner = key
        return (0 if level == 0 else 1, owner) if owner else (0 if level else 1, "")

    def _names(self) -> dict[_Key, str]:
        names: dict[_Key, str] = {}
        count: dict[str, int] = defaultdict(int)
        repeated = {o for _, o in self.order if sum(o == other for _, other in self.order) > 1}
        for key in self.order:
            owner = key[1]
            stem = owner or "block"
            names[key] = f"{stem}_{count[stem]}" if not owner or owner in repeated else stem
            count[stem] += 1
        return names

    def _add_value(self, node: fx.Node, name: str, kind: Any) -> None:
        tensor = node.meta["val"]
        self.values[name] = Value(name, str(tensor.dtype).removeprefix("torch."), self._shape(node), kind)
        self.value_of[node] = name

    def _shape(self, node: fx.Node) -> Shape:
        sizes: list[int | str] = []
        for size in node.meta["val"].shape:
            if isinstance(size, int):
                sizes.append(size)
                continue
            symbol = self.symbols.setdefault(str(size), "T" if not self.symbols else f"?{size}")
            sizes.append(symbol)
        shape = tuple(sizes)
        if shape[0] != 1 or shape.count("T") != 1 or shape[1] != "T":
            raise SplitError(
                f"value {node.name} has shape {list(shape)}: expected [1, T, …] (one sequence, token-major); "
                "a segment's edge cannot be there"
            )
        return shape

    def _name_values(self) -> None:
        layer = 0
        for node in self.graph_module.graph.nodes:
            if node.target is ATTENTION:
                for arg, letter in zip(node.args[:3], "qkv", strict=True):
                    kind = "chunk" if letter == "q" else "cache"
                    if arg in self.value_of:
                        raise SplitError(f"attention {layer} shares its {letter} with another one")
                    self._add_value(arg, f"{letter}_{layer}", kind)
                layer += 1
        for key in self.order:
            crossing = [n for n in self.nodes[key] if self._crosses(n) and n not in self.value_of]
            for index, node in enumerate(crossing):
                suffix = f".{index}" if len(crossing) > 1 else ""
                kind = "output" if node in self.outputs else "chunk"
                self._add_value(node, f"{self.names[key]}{suffix}", kind)

    def _crosses(self, node: fx.Node) -> bool:
        return any(
            user.op == "output" or self.keys.get(user, self.keys[node]) != self.keys[node]
            for user in node.users
        )

    def piece(self, key: _Key) -> _Piece:
        nodes = self.nodes[key]
        members = set(nodes)
        reads: list[fx.Node] = []
        for node in nodes:
            for arg in node.all_input_nodes:
                if _is_tensor(arg) and arg.op != "get_attr" and arg not in members and arg not in reads:
                    reads.append(arg)
        writes = [node for node in nodes if self._crosses(node)]
        is_attention = nodes[0].target is ATTENTION
        if is_attention:
            reads = [arg for arg in nodes[0].args[:3] if isinstance(arg, fx.Node)]
        graph, weight_nodes = _extract(nodes, reads, writes)
        weights = tuple(constant(self.graph_module, node) for node in weight_nodes)
        graph_module = with_weights(graph, weights)
        ports_in = tuple(self._port(node, f"in{i}", is_attention and i > 0) for i, node in enumerate(reads))
        ports_out = tuple(self._port(node, f"out{i}", False) for i, node in enumerate(writes))
        return _Piece(
            name=self.names[key],
            graph_module=graph_module,
            structure=_structure(graph, weights, ports_in),
            weights=weights,
            inputs=ports_in,
            outputs=ports_out,
            reads=tuple(self.value_of[node] for node in reads),
            writes=tuple(self.value_of[node] for node in writes),
            is_attention=is_attention,
        )

    def _port(self, node: fx.Node, name: str, is_cache: bool) -> Port:
        value = self.values[self.value_of[node]]
        shape = tuple("S" if size == "T" and is_cache else size for size in value.shape)
        return Port(name, value.dtype, shape)


def _output_node(graph: fx.Graph) -> fx.Node:
    found: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def _extract(
    nodes: list[fx.Node], reads: list[fx.Node], writes: list[fx.Node]
) -> tuple[fx.Graph, list[fx.Node]]:
    """Copy nodes into a graph of their own; sizes are taken again from the segment's own inputs."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    weight_nodes: list[fx.Node] = []
    for index, node in enumerate(reads):
        copied[node] = graph.placeholder(f"in{index}")
        copied[node].meta["val"] = node.meta["val"]

    def size_of(node: fx.Node) -> fx.Node:
        for read in reads:
            for dim, size in enumerate(read.meta["val"].shape):
                if str(size) == str(node.meta["val"]):
                    result = graph.call_function(torch.ops.aten.sym_size.int, (copied[read], dim))
                    result.meta["val"] = node.meta["val"]
                    return result
        return copy(node)

    def copy(node: fx.Node) -> fx.Node:
        result = graph.node_copy(node, resolve)
        result.name = graph._graph_namespace.create_name(getattr(node.target, "__name__", "op"), result)
        return result

    def resolve(node: fx.Node) -> fx.Node:
        if node not in copied:
            if node.op == "get_attr":
                copied[node] = graph.get_attr(f"w{len(weight_nodes)}")
                copied[node].meta["val"] = node.meta["val"]
                weight_nodes.append(node)
            elif not _is_tensor(node):
                copied[node] = size_of(node)
            else:
                raise SplitError(f"{node.name} is needed by a segment that does not read it")
        return copied[node]

    for node in nodes:
        for arg in node.all_input_nodes:
            resolve(arg)
        copied[node] = copy(node)
    graph.output(tuple(copied[node] for node in writes))
    graph.eliminate_dead_code()
    return graph, weight_nodes


def _structure(graph: fx.Graph, weights: tuple[Tensor, ...], ports: tuple[Port, ...]) -> str:
    """A digest of everything but the numbers of weights of 16 bytes and more."""
    # Tensors too small to be told apart by their bytes (emit.py) count with their numbers.
    numbers = [w.tolist() if w.numel() * w.element_size() < 16 else None for w in weights]
    lines = [str([(p.dtype, p.shape) for p in ports]), str([(w.dtype, tuple(w.shape)) for w in weights])]
    lines.append(str(numbers))
    index = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = node.target if isinstance(node.target, str) else str(node.target)
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
        lines.append(f"{node.op} {target} {args}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def transform_segments(
    torch_split: TorchSplit,
    transform: Callable[
        [fx.GraphModule], tuple[fx.GraphModule, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]]
    ],
    names: frozenset[str] | None = None,
) -> TorchSplit:
    """Rewrite each structure once and carry every segment's weights over.

    `transform` gets a structure's graph and returns the new graph and the function that turns the old
    weights into the new ones.
    """
    graphs: dict[str, fx.GraphModule] = {}
    weights: dict[str, tuple[Tensor, ...]] = {}
    convert: dict[str, Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]] = {}
    segments: list[Segment] = []
    for segment in torch_split.split.segments:
        old = segment.structure
        if names is not None and segment.name not in names:
            graphs[old] = torch_split.graphs[old]
            weights[segment.name] = torch_split.weights[segment.name]
            segments.append(segment)
            continue
        if old not in convert:
            graphs[old], convert[old] = transform(torch_split.graphs[old])
        weights[segment.name] = convert[old](torch_split.weights[segment.name])
        segments.append(segment)
    return TorchSplit(replace(torch_split.split, segments=tuple(segments)), graphs, weights)


def run_eager(torch_split: TorchSplit, input_ids: Tensor, chunk: int | None = None) -> Tensor:
    """Run the split in eager torch, chunk behind chunk, with a growing cache: the numeric reference.

    input_ids int64 [1, T] -> logits float32 [1, T, vocab]. `chunk` None takes the prompt in one piece.
    Raises InputError for a batch larger than 1.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(
            f"input_ids has shape {list(input_ids.shape)}: expected [1, T]; the cache holds the tokens of one "
            "sequence, so run a batch as several sessions"
        )
    modules = {s.name: torch_split.module(s.name) for s in torch_split.split.segments}
    kinds = {value.name: value.kind for value in torch_split.split.values}
    cache: dict[str, Tensor] = {}
    outputs = []
    num_tokens = input_ids.shape[1]
    with torch.no_grad():
        for start in range(0, num_tokens, chunk or num_tokens):
            rows = slice(start, min(start + (chunk or num_tokens), num_tokens))
            env = {"input_ids": input_ids[:, rows], "position_ids": torch.arange(num_tokens)[None, rows]}
            for call in torch_split.split.calls:
                read = [cache[n] if kinds[n] == "cache" else env[n] for n in call.reads]
                for name, result in zip(call.writes, modules[call.segment](*read), strict=True):
                    if kinds[name] == "cache":
                        cache[name] = torch.cat((cache[name], result), 1) if name in cache else result
                    else:
                        env[name] = result
            outputs.append(env[next(n for n, kind in kinds.items() if kind == "output")])
    return torch.cat(outputs, dim=1)
