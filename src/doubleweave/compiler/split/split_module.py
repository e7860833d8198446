"""Split any module by a policy: a function for each module that the policy names, segments for the operators between.

The whole module is traced first, then the named modules, outermost first, each over the sizes that its calls need.
A named module whose calls have different constants or fixed sizes becomes several functions: "fc", "fc#1", ….
pieces.py cuts the graphs; rows.py shows that rows are independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from doubleweave.compiler.policy import (
    DEFAULT_BACKEND,
    DEFAULT_SIZES,
    Dynamic,
    Match,
    Policy,
    Rule,
    Static,
    operator_rules,
    resolve,
)
from doubleweave.compiler.split import call_sizes
from doubleweave.compiler.split import rows as _rows
from doubleweave.compiler.split.call_sizes import Variant
from doubleweave.compiler.split.function_values import Values, own_outputs
from doubleweave.compiler.split.pieces import Piece, TorchSplit, cut_pieces, extract, structure
from doubleweave.compiler.trace import dims as _dims
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.export_flat import tensor_paths
from doubleweave.compiler.trace.trace import bind, trace
from doubleweave.compiler.trace.trace_data import BOUNDARY, Trace
from doubleweave.compiler.trace.trace_data import Call as TracedCall
from doubleweave.errors import PolicyError, SplitError
from doubleweave.ir.sizes import symbols
from doubleweave.ir.split import ROWS, Call, FixedSizes, Function, Range, Segment, SizeRanges, Split


@dataclass(frozen=True)
class ModuleSplit:
    """A split with the first values of its states, by qualified name."""

    torch_split: TorchSplit
    states: dict[str, Tensor]


def split_module(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any, policy: Policy
) -> ModuleSplit:
    """Split `module`, called with these example arguments.

    `dynamic_shapes` is torch.export's, for the whole module. Raises PolicyError for a policy that does not fit the
    module or its calls, SplitError for what cannot be split.
    """
    matches = resolve(module, policy)
    what = type(module).__name__
    root = next((m for m in matches if m.module is module), Match("", module, Dynamic(), "the default"))
    if isinstance(root.rule, Dynamic) and root.rule.dims is not None:
        if dynamic_shapes is not None:
            raise PolicyError(
                "policy: '' gives dims for the whole module, and dynamic_shapes gives them too; leave one out"
            )
        dynamic_shapes = root.rule.dims
    builder = _Builder([m for m in matches if m.module is not module], operator_rules(policy))
    parameters, tensors = bind(what, module.forward, args, kwargs)
    leaves = _dims.leaves(what, parameters, tensors, dynamic_shapes)
    if isinstance(root.rule, Static) and root.rule.chunk is not None:
        leaves = call_sizes.chunked_root(what, root.rule, leaves)
    call_sizes.check_clash(what, module, parameters, leaves, [leaf.example for leaf in leaves])
    builder.add(
        Variant("", root, parameters), trace(what, module, parameters, _dims.with_examples(leaves), matches)
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
    split = Split(tuple(builder.segments.values()), tuple(builder.functions))
    return ModuleSplit(TorchSplit(split, builder.graphs, builder.weights), builder.states)


class _Builder:
    """Collects functions and segments, callers before what they call."""

    def __init__(self, matches: Sequence[Match], operators: Mapping[Any, Rule]) -> None:
        self.operators = operators
        self.operators_met: Counter[Any] = Counter()
        self.of_structure: dict[tuple[str, str], str] = {}  # operators without weights: (structure, device)
        # Outer modules first: a trace gives the sizes at which the modules inside it are called.
        inside = {id(m.module): {id(found) for found in m.module.modules()} for m in matches}
        depth = {id(m.module): sum(id(m.module) in other for other in inside.values()) for m in matches}
        self.matches = sorted(matches, key=lambda m: (depth[id(m.module)], m.name))
        self.variants: dict[int, dict[str, Variant]] = {}
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

    def _variant_of(self, call: TracedCall) -> Variant:
        """The variant that serves a call, made when it is the first of its kind."""
        rule = call.match.rule
        sizes: list[Any] = []
        if isinstance(rule, Static):
            # Fixed sizes are part of a static function; one dynamic function serves calls of different sizes.
            for path, tensor in zip(tensor_paths(call.parameters), call.inputs, strict=True):
                shape = list(map(str, tensor.shape))
                if rule.chunk and path in rule.chunk and shape:
                    shape[rule.chunk[path] % tensor.ndim] = ROWS
                sizes.append(shape)
        key = repr((call.parameters, [(t.dtype, t.ndim) for t in call.inputs], sizes))
        found = self.variants.setdefault(id(call.match.module), {})
        if key not in found:
            name = call.match.name + (f"#{len(found)}" if found else "")
            found[key] = Variant(name, call.match, call.parameters)
        return found[key]

    def trace(self, variant: Variant) -> Trace:
        """Trace a variant over the sizes that its calls need; refuses calls that its rule does not allow."""
        match, rule = variant.match, variant.match.rule
        what = repr(variant.name)
        if isinstance(rule, Static):
            return self._trace_over(variant, self._static_leaves(variant, rule))
        leaves = _dims.leaves(what, variant.parameters, variant.calls[0].inputs, rule.dims)
        if rule.dims is None:
            leaves = call_sizes.free_leaves(variant, leaves)
            # With a name each, axes are unrelated; a module that relates them is refused, and torch finds out how.
            try:
                return self._trace_over(variant, leaves)
            except SplitError:
                return self._trace_over(variant, call_sizes.without_names(variant, leaves))
        for call in variant.calls:
            site = f"{what}, called at {call.site}"
            call_sizes.check_clash(site, match.module, variant.parameters, leaves, call.inputs)
            call_sizes.check_dynamic_call(site, leaves, call)
        return self._trace_over(variant, leaves)

    def _trace_over(self, variant: Variant, leaves: Sequence[Leaf]) -> Trace:
        what = repr(variant.name)
        # The caller's sizes are symbols of another trace; this trace needs numbers to make its own.
        examples = _dims.with_examples([Leaf(x.path, call_sizes.concrete(x.example), x.axes) for x in leaves])
        found = trace(what, variant.match.module, variant.parameters, examples, self.matches)
        for call in variant.calls:
            call_sizes.check_call(f"{what}, called at {call.site}", found, call)
        return found

    def _static_leaves(self, variant: Variant, rule: Static) -> tuple[Leaf, ...]:
        what = repr(variant.name)
        leaves = _dims.leaves(what, variant.parameters, variant.calls[0].inputs, None)
        axes = {} if rule.chunk is None else call_sizes.chunk_axes(what, rule, leaves)
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
                            f"{variant.match.key} makes it Static(), which needs a fixed size; cut it into chunks with "
                            f'chunk={{"{leaf.path}": {axis}}}, or make the module Dynamic'
                        )
            if any(not call_sizes.are_equal(size, rows[0]) for size in rows[1:]):
                raise PolicyError(
                    f"{what}, called at {call.site}: the axes to cut into chunks have sizes "
                    f"{', '.join(map(str, rows))}, expected the same for all of {', '.join(axes)}"
                )
            bounds += [call.bounds(size) for size in rows[:1]]
        if not axes:
            return leaves
        return call_sizes.with_rows(leaves, axes, 1, max(high for _, high in bounds))

    def add(self, variant: Variant, traced: Trace) -> None:
        """Make a function of a trace, and segments of its pieces."""
        for call in traced.calls.values():
            self._variant_of(call).calls.append(call)
        graph = traced.graph_module.graph
        own_outputs(traced)
        self.operators_met.update(
            n.target for n in graph.nodes if n.op == "call_function" and n.target is not BOUNDARY
        )
        pieces = cut_pieces(graph, self._owner)
        namer = Values(variant, traced)
        calls: list[Call] = []
        # A named module that is one segment gives the segment its own name.
        is_leaf = variant.name and [piece.owner for piece in pieces] == [""]
        prefix = f"{variant.name}.glue" if variant.name else "glue"
        taken = Counter(self._variant_of(call).name for call in traced.calls.values())
        count: Counter[str] = Counter()
        for piece in pieces:
            target: Any = piece.nodes[0].target
            if piece.owner.startswith("operator/"):
                stem = f"{variant.name}.{target._opname}".lstrip(".")
                name, rule = f"{stem}_{count[stem]}", self.operators[target]
                count[stem] += 1
                calls.append(self._segment_call(piece, name, stem, rule, str(target), namer))
            elif piece.owner:
                callee = self._variant_of(traced.calls[piece.nodes[0]]).name
                name = f"{callee}_{count[callee]}" if taken[callee] > 1 else callee
                count[callee] += 1
                calls.append(namer.call(piece, name, callee))
            else:
                name = variant.name if is_leaf else f"{prefix}_{count['']}"
                count[""] += 1
                match = variant.match
                calls.append(self._segment_call(piece, name, name, match.rule, match.key, namer))
        self._check_chunked_states(calls, namer.next_of)
        for name, state in zip(namer.next_of, traced.states, strict=True):
            self.states.setdefault(name, variant.match.module.get_buffer(state).detach().clone())
        self.functions.append(namer.function(calls))

    def _check_chunked_states(self, calls: Sequence[Call], next_of: Mapping[str, str]) -> None:
        """Refuse a state that changes chunk by chunk and that other segments use: they would see it in between."""
        for state, after in next_of.items():
            users = [call for call in calls if {state, after} & {*call.reads} or after in call.writes]
            chunked = [call for call in users if _is_chunked(self.segments.get(call.segment))]
            is_own = all(after in c.writes for c in chunked) and [*next_of.values()].count(after) == 1
            if chunked and not is_own:
                raise SplitError(
                    f"{chunked[0].name!r}: state {state!r} becomes another state, or the same as one, which chunk by "
                    "chunk is something else than at once; make it Dynamic"
                )
            if chunked and len(users) > 1:
                raise SplitError(
                    f"{chunked[0].name!r}: changes state {state!r} chunk by chunk, and {len(users)} segments use it; "
                    "name the module that changes it in the policy by itself, or make it Dynamic"
                )

    def _owner(self, node: fx.Node) -> str:
        if node.target is BOUNDARY:
            return f"call/{node.name}"
        return f"operator/{node.name}" if node.target in self.operators else ""

    def _segment_call(
        self, piece: Piece, call_name: str, name: str, rule: Rule, key: str, namer: Values
    ) -> Call:
        """A call of the segment `name` of this piece, or of an earlier segment that computes the same."""
        namer.name_writes(piece, call_name)
        graph_module, weights = extract(piece, piece.reads, namer.traced.graph_module)
        inputs = tuple(namer.port(node) for node in piece.reads)
        outputs = tuple(namer.port(node) for node in piece.writes)
        used = {symbol for port in (*inputs, *outputs) for size in port.shape for symbol in symbols(size)}
        shape: FixedSizes | SizeRanges
        proof = ""
        if not used:
            shape = FixedSizes()
        elif isinstance(rule, Static):
            shape = FixedSizes(_useful_sizes(name, rule, key, namer.traced.ranges))
            states = [port.name in namer.next_of for port in inputs]
            updates = [port.name in namer.next_of.values() for port in outputs]
            graph = _rows.Graph(graph_module, inputs, outputs, states, updates)
            proof = _rows.check(name, graph, shape.sizes)
        else:
            shape = SizeRanges(tuple(r for r in namer.traced.ranges if r.symbol in used))
        digest = structure(graph_module.graph, weights, inputs)
        if piece.owner and not weights:
            # An operator without weights is one segment, called wherever it computes the same.
            taken = sum(found == name or found.startswith(f"{name}.") for found in self.segments)
            name = self.of_structure.setdefault((digest, rule.device), f"{name}.{taken}" if taken else name)
        elif piece.owner:
            name = f"{name}.{sum(found.startswith(f'{name}.') for found in self.segments)}"
        if name not in self.segments:
            self.segments[name] = Segment(
                name, rule.device, DEFAULT_BACKEND, shape, inputs, outputs, digest, rows=proof
            )
            self.graphs.setdefault(digest, graph_module)
            self.weights[name] = weights
        return namer.segment_call(piece, call_name, name)


def _useful_sizes(name: str, rule: Static, key: str, ranges: Sequence[Range]) -> tuple[int, ...]:
    """The sizes of a segment that runs chunk by chunk."""
    if rule.chunk is None or {r.symbol for r in ranges} != {ROWS}:
        raise PolicyError(
            f"{name!r}: the policy's {key} makes it Static(), but sizes in it vary "
            f"({', '.join(f'{r.symbol} from {r.low} to {r.high}' for r in ranges)}); name the axes to cut with "
            "chunk={…}, or make it Dynamic()"
        )
    most = ranges[0].high
    sizes = tuple(sorted(set(rule.sizes or DEFAULT_SIZES)))
    # The smallest size that holds all rows is the last one of use.
    return tuple(size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < most)


def _is_chunked(segment: Segment | None) -> bool:
    return segment is not None and isinstance(segment.shape, FixedSizes) and bool(segment.shape.sizes)
