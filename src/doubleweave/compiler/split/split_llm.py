"""Split a language model: its values get names by layer, K and V become cache, attention is one segment.

Every value is [1, T, …], rows of one sequence. pieces.py cuts the graph; this module gives values the names and kinds
that a run chunk behind chunk needs. Where attention is inlined (static_attention.py), the pieces that append to the
cache also read all rows that earlier chunks left in it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave's operators
from doubleweave.compiler.graph.edges import Edges
from doubleweave.compiler.graph.general_attention import inline_general
from doubleweave.compiler.graph.nodes import ENCODED as GIVEN
from doubleweave.compiler.graph.nodes import PAST, STATE, TOGETHER, output_node
from doubleweave.compiler.graph.ops import ATTENTIONS, BIASED, CROSS, GENERAL
from doubleweave.compiler.graph.positions import moved_tables, num_rows
from doubleweave.compiler.graph.recurrence import RECURRENCE
from doubleweave.compiler.graph.refusal_causes import place_of_node
from doubleweave.compiler.graph.static_attention import WIDTH
from doubleweave.compiler.policy import (
    DEFAULT_BACKEND,
    DEFAULT_SIZES,
    KERNELS_BACKEND,
    Dynamic,
    Policy,
    Rule,
    Static,
    operator_rules,
)
from doubleweave.compiler.split.pieces import Piece, TorchSplit, cut_pieces, extract, structure
from doubleweave.errors import SplitError
from doubleweave.ir.split import (
    CACHED,
    ENCODED,
    ROWS,
    Call,
    FixedSizes,
    Function,
    Port,
    Segment,
    Shape,
    SizeRanges,
    Split,
    Value,
    most_rows,
    rows,
)

# A policy's rule for it is for every kind of attention.
ATTENTION = ATTENTIONS[0]
# Generation reads the logits of a prompt's last row alone, and the head is the widest linear.
_HEAD = "lm_head"


def split_llm(
    graph_module: fx.GraphModule,
    owners: Mapping[str, str],
    policy: Policy,
    *,
    max_context: int,
    max_encoded: int = 0,
) -> TorchSplit:
    """Split a simplified graph by a policy with a rule for everything ("") and a rule for the attention operator.

    `owners` maps qualified module names to segment names; `max_encoded` is the most rows of an encoder.
    Raises SplitError for a value at a segment's edge that is not [1, T, …].
    """
    graph = graph_module.graph
    rule, attention_rule = policy[""], operator_rules(policy)[ATTENTION]
    shape = _rows_of(rule)
    found = {_owner(node, owners) for node in graph.nodes if node.op == "call_function"}
    # No layer reads a rotary table where positions come in otherwise (Flint without windows).
    if missing := set(owners.values()) - found - {"rotary"}:
        raise SplitError(f"no operator of the exported graph belongs to {sorted(missing)}")
    edges = Edges(num_rows(graph))
    pieces = cut_pieces(graph, lambda node: _owner(node, owners), frozenset({_HEAD}), moved_tables(graph))
    names = _names(pieces)
    values = _Values(graph, pieces, names, edges)
    segments: dict[str, Segment] = {}
    graphs: dict[str, fx.GraphModule] = {}
    weights: dict[str, tuple[Tensor, ...]] = {}
    calls: list[Call] = []
    attention_of: dict[str, str] = {}
    for piece, call_name in zip(pieces, names, strict=True):
        queries, keys = _meeting(piece.nodes[0])
        is_attention = bool(keys)
        is_cross = piece.nodes[0].target is CROSS
        is_recurrence = piece.owner.startswith(RECURRENCE)
        # The run time passes q, k, v to its kernel in this order; a piece lists its reads in the order of the graph.
        reads: list[Any] = [*queries, *keys] if is_attention else list(piece.reads)
        piece_graph, tensors = extract(piece, reads, graph_module, edges)
        inline_general(piece_graph.graph)
        # Attention reads K and V with the rows of all chunks so far, and q with those of this chunk.
        cached = range(len(queries), len(reads)) if is_attention and not is_cross else ()
        inputs = tuple(values.port(node, f"in{i}", i in cached) for i, node in enumerate(reads))
        outputs = tuple(values.port(node, f"out{i}", False) for i, node in enumerate(piece.writes))
        digest = structure(piece_graph.graph, tensors, inputs)
        name = call_name
        if is_attention:
            # Equal attentions are one segment, called once a layer: most have no weights, the others a number a head.
            numbers = [tensor.tolist() for tensor in tensors]
            name = attention_of.setdefault(f"{digest} {numbers}", _attention_name(piece, segments))
        if name not in segments:
            on_cpu = is_attention or is_recurrence
            segments[name] = Segment(
                name=name,
                device=attention_rule.device if on_cpu else rule.device,
                backend=KERNELS_BACKEND if is_attention else DEFAULT_BACKEND,
                # A recurrence is compiled for one row, and run for each.
                shape=FixedSizes((1,))
                if is_recurrence
                else rows(1, most_rows(shape), max_encoded=max_encoded)
                if is_cross
                else _shape(name, is_attention, shape, max_context),
                inputs=inputs,
                outputs=outputs,
                structure=digest,
                linear_weights=sum(map(_num_weights, piece.nodes)),
                expert_weights=sum(expert for expert, _ in map(_num_expert_weights, piece.nodes)),
                chosen_weights=sum(chosen for _, chosen in map(_num_expert_weights, piece.nodes)),
                attended_width=sum(node.meta.get(WIDTH, 0) for node in reads),
                each_row=is_recurrence,
            )
            weights[name] = tensors
            graphs.setdefault(digest, piece_graph)
        row_kind: Any = "last" if name == _HEAD else "all"
        read, written = (tuple(values.name_of[node] for node in nodes) for nodes in (reads, piece.writes))
        calls.append(Call(call_name, name, read, written, row_kind))
    everything = tuple(values.values.values())
    results = tuple(value.name for value in everything if value.kind == "output")
    main = Function("", tuple(calls), everything, results)
    return TorchSplit(Split(tuple(segments.values()), (main,)), graphs, weights)


def default_policy(shape: FixedSizes | SizeRanges) -> Policy:
    """Attention is a boundary and dynamic; everything else has this shape, fixed sizes on the NPU."""
    arguments = ("input_ids", "position_ids")
    rule: Rule
    if isinstance(shape, FixedSizes):
        rule = Static(device="npu", chunk=dict.fromkeys(arguments, 1), sizes=shape.sizes)
    else:
        dim = Dim(ROWS, min=1, max=most_rows(shape))
        rule = Dynamic({name: {1: dim} for name in arguments}, device="cpu")
    return {"": rule, ATTENTION: Dynamic(device="cpu")}


def _rows_of(rule: Rule) -> FixedSizes | SizeRanges:
    """The shape that a rule gives the rows of a chunk."""
    if isinstance(rule, Static):
        return FixedSizes(tuple(sorted(rule.sizes or DEFAULT_SIZES)))
    dim = rule.dims["input_ids"][1]
    return rows(dim.min, dim.max)


def _shape(
    name: str, is_attention: bool, static: FixedSizes | SizeRanges, max_context: int
) -> FixedSizes | SizeRanges:
    if is_attention:
        return rows(1, most_rows(static), max_context)
    if isinstance(static, FixedSizes) and name == _HEAD:
        # Only the last row of a prompt has logits that generation reads: a head of 128 rows would compute 127 in vain.
        return FixedSizes(tuple(sorted({1, *static.sizes})))
    return static


def _attention_name(piece: Piece, segments: Mapping[str, Segment]) -> str:
    window = piece.nodes[0].args[6] if piece.nodes[0].target in ATTENTIONS else 0
    name = f"attention_window{window}" if window else "attention"
    name = "cross_attention" if piece.nodes[0].target is CROSS else name
    taken = sum(existing == name or existing.startswith(f"{name}.") for existing in segments)
    return f"{name}.{taken}" if taken else name


def _meeting(node: Any) -> tuple[list[Any], list[Any]]:
    """What attention reads of the newest rows, and of all rows so far; both empty for any other node."""
    if node.target is GENERAL:
        return list(node.args[0]), list(node.args[1])
    return ([node.args[0]], list(node.args[1:3])) if node.target in ATTENTIONS else ([], [])


def _window(node: Any) -> int:
    """The most rows that a query of an attention sees, its own included; 0 for all."""
    if node.target not in ATTENTIONS:
        return 0
    block = node.args[8] if node.target is BIASED else 0
    return min((size for size in (node.args[6], block) if size > 0), default=0)


def _num_weights(node: fx.Node) -> int:
    """The multiply-adds that a linear makes for each row, 0 for any other operator."""
    if node.target is not torch.ops.aten.linear.default:
        return _num_expert_weights(node)[1]
    weight: Any = node.args[1]
    return int(weight.meta["val"].numel())


def _num_expert_weights(node: fx.Node) -> tuple[int, int]:
    """(the weights of all experts, those that a row chooses) of an experts' linear, zeros for any other operator."""
    if node.target is not torch.ops.doubleweave.expert_linear.default:
        return 0, 0
    index, weight = (arg.meta["val"] for arg in node.args[1:3])  # type: ignore[union-attr]
    return int(weight.numel()), int(index.shape[1]) * int(weight[0].numel())


def _owner(node: fx.Node, owners: Mapping[str, str]) -> str:
    if TOGETHER in node.meta:
        return str(node.meta[TOGETHER])
    if node.target in (*ATTENTIONS, GENERAL):
        return f"attention/{node.name}"  # each its own piece
    # A module called twice is listed as name@1.
    paths = (re.sub(r"@\d+", "", path) for path, _ in node.meta.get("nn_module_stack", {}).values())
    return next((owners[path] for path in paths if path in owners), "")


def _names(pieces: Sequence[Piece]) -> list[str]:
    stems = [piece.owner.partition("/")[0] or "block" for piece in pieces]
    total = Counter(stems)
    count: Counter[str] = Counter()
    names = []
    for stem in stems:
        is_numbered = stem in ("block", "attention", RECURRENCE) or total[stem] > 1
        names.append(f"{stem}_{count[stem]}" if is_numbered else stem)
        count[stem] += 1
    return names


class _Values:
    """The values between pieces, by name and by node."""

    def __init__(self, graph: fx.Graph, pieces: Sequence[Piece], names: Sequence[str], edges: Edges) -> None:
        self.edges = edges
        self.values: dict[str, Value] = {}
        self.name_of: dict[fx.Node, str] = {}
        outputs = output_node(graph).all_input_nodes
        pasts = [node for node in graph.nodes if PAST in node.meta]
        states = [node for node in graph.nodes if STATE in node.meta]
        given = [node for node in graph.nodes if GIVEN in node.meta]
        for node in given:
            self._add(node, str(node.target), "encoded")
        for node in states:
            # The next value has the name of the one before, which nothing behind the recurrence reads.
            name = str(node.target)
            self._add(node, name, "state")
            self.name_of[node.meta[STATE]] = name
        for node in graph.nodes:
            if node.op == "placeholder" and node.users and node not in (*pasts, *states, *given):
                self._add(node, str(node.target), "input")
        crosses = [node for node in graph.nodes if node.target is CROSS]
        for layer, attention in enumerate(crosses):
            self._add_once(attention.args[0], f"cross_q_{layer}", "chunk")
        others = (node for node in graph.nodes if node.target is not CROSS)
        attentions = [meeting for node in others if (meeting := _meeting(node))[1]]
        for layer, (queries, keys) in enumerate(attentions):
            for kind, letters, args in (("chunk", "q", queries), ("cache", "kv", keys)):
                for number, arg in enumerate(args):
                    letter = letters[number] if len(args) == len(letters) else f"{letters[0]}{number}"
                    self._add_once(arg, f"{letter}_{layer}", kind)
        self._set_windows(graph)
        for node in pasts:
            name = str(node.target).removeprefix("past_")
            self._add_once(node.meta[PAST], name, "cache")
            self.name_of[node] = name
        for piece, name in zip(pieces, names, strict=True):
            crossing = [node for node in piece.writes if node not in self.name_of]
            for index, node in enumerate(crossing):
                suffix = f".{index}" if len(crossing) > 1 else ""
                self._add(node, f"{name}{suffix}", "output" if node in outputs else "chunk")

    def _set_windows(self, graph: fx.Graph) -> None:
        """Give each value of the cache the widest window of what reads it; what reads all rows has none."""
        windows: dict[str, list[int]] = {}
        for node in graph.nodes:
            for arg in _meeting(node)[1]:
                windows.setdefault(self.name_of[arg], []).append(_window(node))
        for name, found in windows.items():
            if self.values[name].kind == "cache" and all(found):
                self.values[name] = replace(self.values[name], window=max(found))

    def _add_once(self, node: fx.Node, name: str, kind: Any) -> None:
        """One value where layers share a query, or keys and values: the first one's."""
        if node not in self.name_of:
            self._add(node, name, kind)
        elif (found := self.values[self.name_of[node]]).kind != kind:
            letter, _, layer = name.partition("_")
            raise SplitError(
                f"attention {layer} takes {found.name} as its {letter}: a cache holds the keys and values of all "
                "tokens, a query is of one chunk; this architecture is not supported"
            )

    def _add(self, node: fx.Node, name: str, kind: Any) -> None:
        tensor = node.meta["val"]
        # A state is there once, not once a row.
        shape: Shape
        if kind == "state":
            shape = (1, *map(int, tensor.shape[1:]))
        elif kind == "encoded":
            shape = (1, ENCODED, *map(int, tensor.shape[2:]))
        else:
            shape = self._shape(node)
        self.values[name] = Value(name, str(tensor.dtype).removeprefix("torch."), shape, kind)
        self.name_of[node] = name

    def _shape(self, node: fx.Node) -> Shape:
        sizes = self.edges.shape(node)
        names = {str(self.edges.symbol): ROWS}
        shape = tuple(size if isinstance(size, int) else names.get(str(size), f"?{size}") for size in sizes)
        # Token-major rows: a chunk's K and V are then whole rows of the cache, and are written in place.
        if shape[0] != 1 or shape.count(ROWS) != 1 or shape[1] != ROWS:
            raise SplitError(
                f"{place_of_node(node)} makes a value of shape [{', '.join(map(str, shape))}] ({node.name}) "
                f"that another segment reads: expected [1, {ROWS}, …], a row a token; this architecture is not "
                "supported"
            )
        return shape

    def port(self, node: fx.Node, name: str, is_cache: bool) -> Port:
        value = self.values[self.name_of[node]]
        if PAST in node.meta:
            return Port(name, value.dtype, tuple(map(int, node.meta["val"].shape)))
        shape = tuple(CACHED if size == ROWS and is_cache else size for size in value.shape)
        return Port(name, value.dtype, shape)
