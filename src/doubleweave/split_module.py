"""Split any module by a policy: a function for each module that the policy names, segments for what is between.

The whole module is traced first, then the named ones, outermost first, each over the sizes that its calls need.
A named module that is called in ways one trace cannot serve (other constants, other fixed sizes) becomes several
functions: "fc", "fc#1", …. What is a piece is decided in split.py; how rows are shown independent, in rows.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from doubleweave import dims as _dims
from doubleweave import rows as _rows
from doubleweave.dims import Leaf
from doubleweave.errors import PolicyError, SplitError
from doubleweave.interface import Parameter
from doubleweave.ir import ROWS, Call, Dynamic, Function, Port, Range, Segment, Split, State, Static, Value
from doubleweave.policy import DEFAULT_SIZES, Match, Policy, Rule, operator_rules, resolve
from doubleweave.policy import Dynamic as DynamicRule
from doubleweave.policy import Static as StaticRule
from doubleweave.simplify import constant
from doubleweave.sizes import symbols
from doubleweave.split import Piece, TorchSplit, cut_pieces, extract, output_node, structure
from doubleweave.trace import BOUNDARY, Trace, bind, suggest, trace
from doubleweave.trace import Call as TracedCall

_BACKEND = "xnnpack"
aten = torch.ops.aten


@dataclass(frozen=True)
class ModuleSplit:
    """A split with the first values of its states, by qualified name."""

    torch_split: TorchSplit
    states: dict[str, Tensor]


@dataclass
class _Variant:
    """A named module as called in one way; several calls share it."""

    name: str
    match: Match
    parameters: tuple[Parameter, ...]
    calls: list[TracedCall] = field(default_factory=list)


def split_module(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any,
    policy: Policy,
) -> ModuleSplit:
    """Split `module`, called with these example arguments.

    `dynamic_shapes` is torch.export's, for the whole module. Raises PolicyError for a policy that does not fit the
    module or its calls, SplitError for what cannot be split.
    """
    matches = resolve(module, policy)
    what = type(module).__name__
    root = next((m for m in matches if m.module is module), Match("", module, DynamicRule(), "the default"))
    builder = _Builder([m for m in matches if m.module is not module], operator_rules(policy))
    parameters, tensors = bind(what, module, args, kwargs)
    leaves = _dims.leaves(what, parameters, tensors, dynamic_shapes)
    if isinstance(root.rule, StaticRule) and root.rule.chunk is not None:
        leaves = _chunked_root(what, root.rule, leaves)
    _check_clash(what, module, parameters, leaves, [leaf.example.shape for leaf in leaves])
    builder.add(
        _Variant("", root, parameters), trace(what, module, parameters, _dims.with_examples(leaves), matches)
    )
    for match in builder.matches:
        for variant in builder.variants.get(id(match.module), {}).values():
            builder.add(variant, builder.trace(variant))
        if id(match.module) not in builder.variants:
            raise PolicyError(
                f"policy: {match.key} names {match.name!r}, whose forward is never called for these arguments; "
                "leave the key out, or name the module whose forward is"
            )
    builder.check_operators(what)
    return builder.result()


def _chunked_root(what: str, rule: StaticRule, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """The whole module cut into chunks: the rows become "T", with the range that dynamic_shapes gives."""
    axes = _chunk_axes(what, rule, leaves)
    bounds = []
    for leaf in leaves:
        if leaf.path not in axes:
            continue
        size = leaf.example.shape[axes[leaf.path]]
        dim = leaf.axes.get(axes[leaf.path])
        if dim is not None and not isinstance(dim, Dim):
            raise PolicyError(
                f"{what}: axis {axes[leaf.path]} of {leaf.path} is cut into chunks, and needs a "
                "torch.export.Dim(name, min=…, max=…) in dynamic_shapes"
            )
        bounds.append((1, size) if dim is None else (dim.min, dim.max))
    low, high = max(b[0] for b in bounds), min(b[1] for b in bounds)
    return _with_rows(leaves, axes, low, high)


def _with_rows(leaves: Sequence[Leaf], axes: Mapping[str, int], low: int, high: int) -> tuple[Leaf, ...]:
    dim = Dim(ROWS, min=low, max=max(2, high))
    return tuple(
        Leaf(leaf.path, leaf.example, {**leaf.axes, axes[leaf.path]: dim}) if leaf.path in axes else leaf
        for leaf in leaves
    )


def _chunk_axes(what: str, rule: StaticRule, leaves: Sequence[Leaf]) -> dict[str, int]:
    """The axis of each tensor along which rows are cut, from the rule's chunk."""
    assert rule.chunk is not None
    ranks = {leaf.path: leaf.example.ndim for leaf in leaves}
    axes = {}
    for path, axis in rule.chunk.items():
        if path not in ranks:
            raise PolicyError(
                f"{what}: chunk names {path!r}, expected one of its tensors: {', '.join(ranks) or '(none)'}"
            )
        if type(axis) is not int or not -ranks[path] <= axis < ranks[path]:
            raise PolicyError(
                f"{what}: chunk={{{path!r}: {axis!r}}}, but {path} has {ranks[path]} axes, 0 to {ranks[path] - 1}"
            )
        axes[path] = axis % ranks[path]
    return axes


def _check_clash(
    what: str,
    module: nn.Module,
    parameters: tuple[Parameter, ...],
    leaves: Sequence[Leaf],
    shapes: Sequence[Any],
) -> None:
    """Refuse one Dim for axes of different sizes, and say which dims would work."""
    seen: dict[str, tuple[Any, str]] = {}
    for leaf, shape in zip(leaves, shapes, strict=True):
        for axis, dim in leaf.axes.items():
            if not isinstance(dim, Dim) or hasattr(dim, "root"):
                continue
            size, where = shape[axis], f"axis {axis} of {leaf.path}"
            before, place = seen.setdefault(dim.__name__, (size, where))
            if not _are_equal(size, before):
                tensors = [
                    torch.zeros([_hint(s) for s in found], dtype=leaf.example.dtype)
                    for leaf, found in zip(leaves, shapes, strict=True)
                ]
                works = suggest(module, parameters, tensors)
                hint = f"; dims that would work: {works}" if works else ""
                raise PolicyError(
                    f"{what}: dim {dim.__name__!r} stands for {place}, which is {before}, and for {where}, which is "
                    f"{size}: one Dim means equal sizes, so give them two{hint}"
                )


def _expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _are_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same whatever the symbols are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    known = a if not isinstance(a, int) else b
    difference = sympy.simplify(_expression(a) - _expression(b))
    return difference == 0 or bool(
        known.node.shape_env.evaluate_static_only(sympy.Eq(_expression(a), _expression(b)))
        if hasattr(known.node.shape_env, "evaluate_static_only")
        else False
    )


class _Builder:
    """Collects functions and segments, callers before what they call."""

    def __init__(self, matches: Sequence[Match], operators: Mapping[Any, Rule]) -> None:
        self.operators = operators
        self.operators_met: Counter[Any] = Counter()
        self.of_structure: dict[tuple[str, str], str] = {}  # operators without weights: (structure, device)
        inside = {id(m.module): {id(found) for found in m.module.modules()} for m in matches}
        depth = {id(m.module): sum(id(m.module) in other for other in inside.values()) for m in matches}
        self.matches = sorted(matches, key=lambda m: (depth[id(m.module)], m.name))
        self.variants: dict[int, dict[str, _Variant]] = {}
        self.functions: list[Function] = []
        self.segments: dict[str, Segment] = {}
        self.graphs: dict[str, fx.GraphModule] = {}
        self.weights: dict[str, tuple[Tensor, ...]] = {}
        self.states: dict[str, Tensor] = {}

    def check_operators(self, what: str) -> None:
        for key in self.operators:
            if not self.operators_met[key]:
                near = [str(name) for name, _ in self.operators_met.most_common(12)]
                raise PolicyError(
                    f"policy: {what} does not call {key}; operators that it calls: {', '.join(near) or '(none)'}"
                )

    def result(self) -> ModuleSplit:
        split = Split(tuple(self.segments.values()), tuple(self.functions))
        return ModuleSplit(TorchSplit(split, self.graphs, self.weights), self.states)

    def _variant_of(self, call: TracedCall) -> _Variant:
        """The variant that serves a call, made when it is the first of its kind."""
        rule = call.match.rule
        sizes: list[Any] = []
        if isinstance(rule, StaticRule):
            paths = [path for p in call.parameters if p.tree is not None for path in p.tree.paths(p.name)]
            cut = rule.chunk or {}
            for path, tensor in zip(paths, call.inputs, strict=True):
                axis = cut.get(path)
                sizes.append(
                    [
                        "T" if axis is not None and i == axis % tensor.ndim else str(size)
                        for i, size in enumerate(tensor.shape)
                    ]
                )
        key = repr((call.parameters, [(t.dtype, t.ndim) for t in call.inputs], sizes))
        found = self.variants.setdefault(id(call.match.module), {})
        if key not in found:
            name = call.match.name + (f"#{len(found)}" if found else "")
            found[key] = _Variant(name, call.match, call.parameters)
        return found[key]

    def trace(self, variant: _Variant) -> Trace:
        """Trace a variant over the sizes that its calls need; refuses calls that its rule does not allow."""
        match, rule = variant.match, variant.match.rule
        what = repr(variant.name)
        first = variant.calls[0]
        if isinstance(rule, StaticRule):
            leaves = self._static_leaves(variant, rule)
        else:
            leaves = _dims.leaves(what, variant.parameters, first.inputs, rule.dims)
            if rule.dims is None:
                leaves = _free_leaves(variant, leaves)
            for call in variant.calls:
                site = f"{what}, called at {call.site}"
                _check_clash(site, match.module, variant.parameters, leaves, [t.shape for t in call.inputs])
                _check_dynamic_call(site, leaves, call)
        leaves = tuple(Leaf(x.path, _concrete(x.example), x.axes) for x in leaves)
        found = trace(what, match.module, variant.parameters, _dims.with_examples(leaves), self.matches)
        for call in variant.calls:
            _check_call(f"{what}, called at {call.site}", found, call)
        return found

    def _static_leaves(self, variant: _Variant, rule: StaticRule) -> tuple[Leaf, ...]:
        what = repr(variant.name)
        leaves = _dims.leaves(what, variant.parameters, variant.calls[0].inputs, None)
        axes = {} if rule.chunk is None else _chunk_axes(what, rule, leaves)
        bounds = []
        for call in variant.calls:
            rows: list[Any] = []
            for leaf, tensor in zip(leaves, call.inputs, strict=True):
                for axis, size in enumerate(tensor.shape):
                    if axes.get(leaf.path) == axis:
                        rows.append(size)
                    elif not isinstance(size, int):
                        low, high = call.bounds(size)
                        raise PolicyError(
                            f"{what}, called at {call.site}: axis {axis} of {leaf.path} is {low} to {high}, but "
                            f"{variant.match.key} makes it Static, which needs a fixed size; cut it into chunks with "
                            f'chunk={{"{leaf.path}": {axis}}}, or make the module Dynamic'
                        )
            if any(not _are_equal(size, rows[0]) for size in rows[1:]):
                raise PolicyError(
                    f"{what}, called at {call.site}: the axes to cut into chunks have sizes "
                    f"{', '.join(map(str, rows))}, expected the same for all of {', '.join(axes)}"
                )
            bounds += [call.bounds(size) for size in rows[:1]]
        if not axes:
            return leaves
        return _with_rows(leaves, axes, 1, max(high for _, high in bounds))

    def add(self, variant: _Variant, traced: Trace) -> None:
        """Make a function of a trace, and segments of its pieces."""
        for call in traced.calls.values():
            self._variant_of(call).calls.append(call)
        graph = traced.graph_module.graph
        _own_outputs(traced)
        self.operators_met.update(
            n.target for n in graph.nodes if n.op == "call_function" and n.target is not BOUNDARY
        )
        pieces = cut_pieces(graph, self._owner)
        namer = _Values(variant, traced)
        calls: list[Call] = []
        glue = [piece for piece in pieces if not piece.owner]
        is_leaf = len(pieces) == len(glue) == 1 and variant.name
        prefix = f"{variant.name}.glue" if variant.name else "glue"
        taken = Counter(self._variant_of(call).name for call in traced.calls.values())
        count: Counter[str] = Counter()
        for piece in pieces:
            target: Any = piece.nodes[0].target
            if piece.owner.startswith("operator/"):
                stem = f"{variant.name}.{target._opname}".lstrip(".")
                name, rule = f"{stem}_{count[stem]}", self.operators[target]
                count[stem] += 1
                namer.name_writes(piece, name)
                segment = self._add_segment(stem, rule, str(target), variant, traced, namer, piece)
                calls.append(namer.segment_call(piece, name, segment))
                continue
            if piece.owner:
                callee = self._variant_of(traced.calls[piece.nodes[0]]).name
                name = f"{callee}_{count[callee]}" if taken[callee] > 1 else callee
                count[callee] += 1
                calls.append(namer.call(piece, name, callee))
                continue
            name = variant.name if is_leaf else f"{prefix}_{count['']}"
            count[""] += 1
            namer.name_writes(piece, name)
            match = variant.match
            segment = self._add_segment(name, match.rule, match.key, variant, traced, namer, piece)
            calls.append(namer.segment_call(piece, name, segment))
        self._check_chunked_states(calls, namer.next_of)
        for state, tensor in namer.first_values(variant.match.module).items():
            self.states.setdefault(state, tensor)
        self.functions.append(namer.function(calls))

    def _check_chunked_states(self, calls: Sequence[Call], next_of: Mapping[str, str]) -> None:
        """A state that changes chunk by chunk must be seen by the one segment that does so."""
        for state, after in next_of.items():
            users = [
                call for call in calls if state in call.reads or after in call.writes or after in call.reads
            ]
            chunked = [call for call in users if _is_chunked(self.segments.get(call.segment))]
            if chunked and len(users) > 1:
                raise SplitError(
                    f"{chunked[0].name!r}: changes state {state!r} chunk by chunk, and {len(users)} segments use it; "
                    "name the module that changes it in the policy by itself, or make it Dynamic"
                )

    def _owner(self, node: fx.Node) -> str:
        if node.target is BOUNDARY:
            return f"call/{node.name}"
        return f"operator/{node.name}" if node.target in self.operators else ""

    def _add_segment(
        self, name: str, rule: Rule, key: str, variant: _Variant, traced: Trace, namer: _Values, piece: Piece
    ) -> str:
        """Make a segment of a piece, or find the one that computes the same; returns its name."""
        graph_module, weights = extract(piece, piece.reads, lambda node: constant(traced.graph_module, node))
        inputs = tuple(namer.port(node) for node in piece.reads)
        outputs = tuple(namer.port(node) for node in piece.writes)
        used = {symbol for port in (*inputs, *outputs) for size in port.shape for symbol in symbols(size)}
        shape: Static | Dynamic
        proof = ""
        if not used:
            shape = Static()
        elif isinstance(rule, StaticRule):
            shape, proof = _chunked(name, rule, key, traced, namer, piece, graph_module, inputs, outputs)
        else:
            shape = Dynamic(tuple(r for r in traced.ranges if r.symbol in used))
        digest = structure(graph_module.graph, weights, inputs)
        if piece.owner and not weights:
            # An operator without weights is one segment, called wherever it computes the same.
            taken = sum(found == name or found.startswith(f"{name}.") for found in self.segments)
            name = self.of_structure.setdefault((digest, rule.device), f"{name}.{taken}" if taken else name)
        elif piece.owner:
            name = f"{name}.{sum(found.startswith(f'{name}.') for found in self.segments)}"
        if name in self.segments:
            return name
        self.segments[name] = Segment(name, rule.device, _BACKEND, shape, inputs, outputs, digest, rows=proof)
        self.graphs.setdefault(digest, graph_module)
        self.weights[name] = weights
        return name


def _chunked(
    name: str,
    rule: StaticRule,
    key: str,
    traced: Trace,
    namer: _Values,
    piece: Piece,
    graph_module: fx.GraphModule,
    inputs: tuple[Port, ...],
    outputs: tuple[Port, ...],
) -> tuple[Static, str]:
    if rule.chunk is None or {r.symbol for r in traced.ranges} != {ROWS}:
        raise PolicyError(
            f"{name!r}: {key} makes it Static, but sizes of it vary "
            f"({', '.join(r.symbol for r in traced.ranges)}); name the axes to cut with chunk={{…}}, or make it "
            "Dynamic"
        )
    most = traced.ranges[0].high
    sizes = tuple(sorted(set(rule.sizes or DEFAULT_SIZES)))
    useful = tuple(size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < most)
    states = [port.name in namer.next_of for port in inputs]
    updates = {namer.name_of[node] for node in piece.writes} & set(namer.next_of.values())
    proof = _rows.check(
        name, graph_module, inputs, outputs, useful, states, [port.name in updates for port in outputs]
    )
    return Static(useful), proof


def _is_chunked(segment: Segment | None) -> bool:
    return segment is not None and isinstance(segment.shape, Static) and bool(segment.shape.sizes)


def _free_leaves(variant: _Variant, leaves: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
    """Dims for a module without any: axes are dynamic where the calls differ or vary themselves."""
    dynamic = [
        {
            axis
            for axis in range(leaf.example.ndim)
            if any(
                not isinstance(call.inputs[i].shape[axis], int)
                or call.inputs[i].shape[axis] != leaf.example.shape[axis]
                for call in variant.calls
            )
        }
        for i, leaf in enumerate(leaves)
    ]
    # torch takes a 1 for a constant: show it a call in which no dynamic axis is 1.
    shown = next(
        (
            call
            for call in variant.calls
            if all(_hint(call.inputs[i].shape[axis]) > 1 for i, axes in enumerate(dynamic) for axis in axes)
        ),
        None,
    )
    if shown is None:
        raise PolicyError(
            f"{variant.name!r}: each of its calls has an axis of size 1 that varies; name its dims, "
            "Dynamic({argument: {axis: Dim(…)}})"
        )
    result = []
    for i, (leaf, axes) in enumerate(zip(leaves, dynamic, strict=True)):
        hints = {}
        for axis in sorted(axes):
            bounds = [call.bounds(call.inputs[i].shape[axis]) for call in variant.calls]
            hints[axis] = Dim.AUTO(min=min(b[0] for b in bounds), max=max(b[1] for b in bounds))
        result.append(Leaf(leaf.path, shown.inputs[i], hints))
    return tuple(result)


def _concrete(tensor: Tensor) -> Tensor:
    return torch.zeros([_hint(size) for size in tensor.shape], dtype=tensor.dtype)


def _check_dynamic_call(site: str, leaves: Sequence[Leaf], call: TracedCall) -> None:
    """Whether a call's sizes are those that the rule's dims allow."""
    for leaf, tensor in zip(leaves, call.inputs, strict=True):
        for axis, size in enumerate(tensor.shape):
            dim = leaf.axes.get(axis)
            low, high = call.bounds(size)
            if dim is None:
                if not isinstance(size, int) or size != _hint(leaf.example.shape[axis]):
                    sizes = f"{low} to {high}" if low != high else str(low)
                    raise PolicyError(
                        f"{site}: axis {axis} of {leaf.path} is {sizes}, and elsewhere "
                        f"{_hint(leaf.example.shape[axis])}, but its dims do not name that axis; add "
                        f'{{"{leaf.path}": {{{axis}: Dim(…)}}}}'
                    )
            elif isinstance(dim, Dim) and not dim.min <= low <= high <= dim.max:
                sizes = f"{low} to {high}" if low != high else str(low)
                raise PolicyError(
                    f"{site}: axis {axis} of {leaf.path} is {sizes}, and its dim {dim.__name__!r} allows {dim.min} to "
                    f"{dim.max}; widen the dim, or narrow the caller's"
                )


def _check_call(site: str, traced: Trace, call: TracedCall) -> None:
    """Whether a call's sizes stand to one another as the traced module needs it."""
    placeholders = [node for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
    bound: dict[Any, Any] = {}
    for leaf, node, tensor in zip(traced.leaves, placeholders, call.inputs, strict=False):
        for axis, (wanted, size) in enumerate(zip(node.meta["val"].shape, tensor.shape, strict=True)):
            expression = _expression(wanted)
            found = _expression(size)
            if isinstance(expression, sympy.Symbol) and expression not in bound:
                bound[expression] = found
                continue
            expected = expression.xreplace(bound)
            if sympy.simplify(expected - found) != 0:
                raise PolicyError(
                    f"{site}: axis {axis} of {leaf.path} is {size}, expected {traced.size(wanted)} = {expected}: "
                    "give its dims so that they serve every call"
                )


def _own_outputs(traced: Trace) -> None:
    """Let a segment of this function write each state's next value, and whatever is not computed at all."""
    graph = traced.graph_module.graph
    output = output_node(graph)
    nodes = list(output.args[0])  # type: ignore[arg-type]
    num_results = len(nodes) - len(traced.states)
    seen = set(nodes[:num_results])
    for index, node in enumerate(nodes):
        is_state = index >= num_results
        needs_clone = node.op == "get_attr" or (
            is_state and (node in seen or node.op != "call_function" or _is_result_of_call(node))
        )
        if is_state:
            seen.add(node)
        if needs_clone:
            nodes[index] = _clone(graph, node, output)
    output.args = (tuple(nodes),)
    for boundary in traced.calls:
        given: Any = boundary.args[0]
        arguments = [_clone(graph, node, boundary) if node.op == "get_attr" else node for node in given]
        boundary.args = (arguments, *boundary.args[1:])


def _is_result_of_call(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, fx.Node) and source.target is BOUNDARY


def _clone(graph: fx.Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        clone = graph.call_function(aten.clone.default, (node,))
    clone.meta["val"] = node.meta["val"]
    return clone


class _Values:
    """The values of one function, by name and by node."""

    def __init__(self, variant: _Variant, traced: Trace) -> None:
        self.variant, self.traced = variant, traced
        self.values: dict[str, Value] = {}
        self.name_of: dict[fx.Node, str] = {}
        self.ranges = traced.ranges
        graph = traced.graph_module.graph
        self.results: list[fx.Node] = list(output_node(graph).args[0])  # type: ignore[arg-type]
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, leaf in zip(placeholders, traced.leaves, strict=False):
            self._add(node, leaf.path, "input")
        owner = f"{variant.match.name}." if variant.match.name else ""
        self.next_of: dict[str, str] = {}
        for node, state in zip(placeholders[len(traced.leaves) :], traced.states, strict=True):
            self._add(node, owner + state, "state")
            self.next_of[owner + state] = f"{owner}{state}.next"
        num_results = len(self.results) - len(traced.states)
        self.outputs = self.results[:num_results]
        for node, name in zip(self.results[num_results:], self.next_of.values(), strict=True):
            self._add(node, name, "chunk")

    def _add(self, node: fx.Node, name: str, kind: Any) -> None:
        if node in self.name_of:
            return
        while name in self.values:
            name += "'"
        self.name_of[node] = name
        self.values[name] = self._value(name, node.meta["val"], kind)

    def _value(self, name: str, tensor: Tensor, kind: Any) -> Value:
        shape = tuple(self.traced.size(size) for size in tensor.shape)
        return Value(name, str(tensor.dtype).removeprefix("torch."), shape, kind)

    def name_writes(self, piece: Piece, name: str) -> None:
        crossing = [node for node in piece.writes if node not in self.name_of]
        for index, node in enumerate(crossing):
            suffix = f".{index}" if len(crossing) > 1 else ""
            self._add(node, name + suffix, "output" if node in self.outputs else "chunk")

    def port(self, node: fx.Node) -> Port:
        value = self.values[self.name_of[node]]
        return Port(value.name, value.dtype, value.shape)

    def call(self, piece: Piece, name: str, callee: str) -> Call:
        """A call of a named module, with a value for each of its results, read or not."""
        boundary = piece.nodes[0]
        results: list[Tensor] = boundary.meta["val"]
        writes = []
        for index, tensor in enumerate(results):
            stem = f"{name}.{index}" if len(results) > 1 else name
            readers = [n for n in piece.nodes[1:] if n.args[0] is boundary and n.args[1] == index]
            is_output = any(node in self.outputs for node in readers)
            while stem in self.values:
                stem += "'"
            self.values[stem] = self._value(stem, tensor, "output" if is_output else "chunk")
            for node in readers:
                self.name_of[node] = stem
            writes.append(stem)
        reads = tuple(self.name_of[node] for node in boundary.args[0])  # type: ignore[union-attr,index]
        return Call(name, callee, reads, tuple(writes), callee="function")

    def segment_call(self, piece: Piece, name: str, segment: str) -> Call:
        reads = tuple(self.name_of[node] for node in piece.reads)
        return Call(name, segment, reads, tuple(self.name_of[node] for node in piece.writes))

    def first_values(self, module: nn.Module) -> dict[str, Tensor]:
        return {
            name: module.get_buffer(state).detach().clone()
            for name, state in zip(self.next_of, self.traced.states, strict=True)
        }

    def function(self, calls: Sequence[Call]) -> Function:
        return Function(
            name=self.variant.name,
            calls=tuple(calls),
            values=tuple(self.values.values()),
            outputs=tuple(self.name_of[node] for node in self.outputs),
            ranges=tuple(Range(*r) for r in self.ranges),
            states=tuple(State(*pair) for pair in self.next_of.items()),
            interface=self.traced.interface,
        )
