"""From what torch.export gives to a Trace: named modules cut out, buffers that change lifted, symbols named.

It knows nothing of how the module was run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import has_side_effect
from torch.utils._sympy.value_ranges import ValueRanges

from doubleweave.compiler.graph.nodes import IN_ORDER
from doubleweave.compiler.graph.simplify import drop_no_ops
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.trace_data import BOUNDARY, MODULE, Call, Trace
from doubleweave.errors import PolicyError, SplitError
from doubleweave.ir.interface import Interface
from doubleweave.ir.split import Range


@dataclass
class _Unlifted:
    """A graph whose weights are get_attr nodes again, of buffers of `root`."""

    graph: fx.Graph
    root: nn.Module
    inputs: list[fx.Node] = field(default_factory=list)
    states: dict[str, fx.Node] = field(default_factory=dict)


def cut_out_calls(
    what: str,
    module: nn.Module,
    exported: torch.export.ExportedProgram,
    interface: Interface,
    leaves: tuple[Leaf, ...],
    calls: list[Call],
) -> Trace:
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            if str(node.target) == "with_effects":
                raise SplitError(
                    f"{what}: does something beside computing tensors, such as printing, which a program cannot; "
                    "take it out"
                )
            raise SplitError(
                f"{what}: has {node.target} (data-dependent control flow), which a segment cannot hold; take the "
                "branch outside the module"
            )
    bodies = _Bodies(module, {id(call.match.module) for call in calls})
    _unify(exported, leaves)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(exported.graph, copied)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    output = graph.output(result)
    found = _Unlifted(graph, nn.Module())
    changed = _changed(what, exported, bodies)
    _unlift(what, exported, copied, found, changed)
    outputs: Any = output.args[0]  # read now: a state may be a result as it is
    kept: list[Any] = []
    new_states: dict[str, Any] = {}
    for spec, value in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(value)
        elif spec.target in changed:
            new_states[str(spec.target)] = value
    output.args = ((*kept, *(new_states[name] for name in found.states)),)
    for node in graph.nodes:
        # At a segment's edge tensors become contiguous: what was a view of strided memory may have to copy.
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    _check_states(what, graph, bodies)
    boundaries = _cut_out(graph, calls, bodies)
    graph_module = fx.GraphModule(found.root, graph)
    drop_no_ops(graph_module)
    _check(what, graph, bodies)
    names, ranges = _symbols(exported, found.inputs, leaves)
    by_name = {r.symbol: r for r in ranges}
    for node, call in boundaries.items():
        # Not the shape environment's own bounds: it takes most sizes to be at least 2.
        call.ranges = {s: ValueRanges(by_name[n].low, by_name[n].high) for s, n in names.items()}
        call.inputs = tuple(source.meta["val"] for source in node.args[0])  # type: ignore[union-attr]
    states = tuple(name.removeprefix(f"{MODULE}.") for name in found.states)
    return Trace(graph_module, interface, leaves, states, boundaries, names, ranges)


def _unify(exported: torch.export.ExportedProgram, leaves: Sequence[Leaf]) -> None:
    """Let sizes of one Dim be one symbol; torch keeps one for each argument."""
    first: dict[str, Any] = {}
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = placeholders[len(placeholders) - len(leaves) :]
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, dim in leaf.axes.items():
            size = node.meta["val"].shape[axis]
            if not isinstance(dim, Dim) or hasattr(dim, "root") or isinstance(size, int):
                continue
            before = first.setdefault(dim.__name__, size)
            symbol, wanted = size.node.expr, before.node.expr
            if symbol != wanted and isinstance(symbol, sympy.Symbol):
                size.node.shape_env._set_replacement(symbol, wanted, f"both are {dim.__name__}")


class _Bodies:
    """Which nodes and buffers belong to the modules that the policy names inside the traced one."""

    def __init__(self, module: nn.Module, named: set[int]) -> None:
        self._named: dict[str, str] = {}  # the path of a named module -> its name
        self._inside: dict[str, str] = {}  # the path of any module in a named one -> the outermost one's name
        self._innermost: dict[str, nn.Module | None] = {}  # the same -> the innermost one
        self._modules: dict[str, nn.Module] = {}  # by name
        for name, found in module.named_modules(remove_duplicate=False):
            path = f"{MODULE}.{name}" if name else MODULE
            parent = path.rpartition(".")[0]
            outer, inner = self._inside.get(parent), self._innermost.get(parent)
            self._modules[name] = found
            if id(found) in named and found is not module:
                self._named[path] = name
                outer, inner = outer or name, found
            self._innermost[path] = inner
            if outer is not None:
                self._inside[path] = outer
        self._names: dict[int, list[str]] = {}  # of each buffer
        for name, buffer in module.named_buffers(remove_duplicate=False):
            self._names.setdefault(id(buffer), []).append(f"{MODULE}.{name}")

    def module(self, name: str | None) -> nn.Module | None:
        """The module of this name in the traced one."""
        return None if name is None else self._modules[name]

    def check_shared(self, what: str, buffer: Tensor) -> None:
        """Refuse a state that a named module has, and one around it or beside it too."""
        names = self._names.get(id(buffer), [])
        owners = {name: self._innermost[name.rpartition(".")[0]] for name in names}
        if len({id(owner) for owner in owners.values()}) > 1:
            one, *_, other = sorted(owners, key=lambda name: self.of_buffer(name) is not None)
            raise SplitError(
                f"{what}: changes buffer {one.removeprefix(MODULE + '.')!r}, which is also "
                f"{other.removeprefix(MODULE + '.')!r} in {self.of_buffer(other)!r}; name the module that has the "
                "buffer in the policy"
            )

    def of_buffer(self, name: str) -> str | None:
        """The named module that a buffer of this qualified name is in."""
        return self._inside.get(name.rpartition(".")[0])

    def of_node(self, node: fx.Node) -> str | None:
        """The outermost named module that was being called when this was computed."""
        # Called from elsewhere, a shared module has the same path; only its callers tell.
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            found = self._named.get(path.split("@")[0])
            if found is not None:
                return found
        return None


def _changed(what: str, exported: torch.export.ExportedProgram, bodies: _Bodies) -> set[str]:
    """Names of the buffers that this module itself changes (not those of named ones inside it)."""
    changed = set()
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise SplitError(
                f"{what}: changes its argument in place; expected a module that leaves its arguments as they are: "
                "write into a clone"
            )
        if spec.kind is OutputKind.BUFFER_MUTATION:
            name = str(spec.target)
            bodies.check_shared(what, (exported.constants | exported.state_dict)[name])
            if bodies.of_buffer(name) is None:
                changed.add(name)
        elif spec.kind is not OutputKind.USER_OUTPUT:
            raise SplitError(
                f"{what}: changes {str(spec.target).removeprefix(MODULE + '.')!r} in forward, expected a buffer; make "
                "it one with register_buffer"
            )
    return changed


def _unlift(
    what: str,
    exported: torch.export.ExportedProgram,
    copied: Mapping[fx.Node, fx.Node],
    found: _Unlifted,
    changed: set[str],
) -> None:
    graph = found.graph
    mutated_inside = {
        str(spec.target)
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION and str(spec.target) not in changed
    }
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for spec, placeholder in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        node = copied[placeholder]
        if spec.kind is InputKind.USER_INPUT:
            found.inputs.append(node)
            continue
        name = str(spec.target)
        if spec.kind is InputKind.BUFFER and name in changed:
            found.states[name] = node
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise SplitError(f"{what}: has a {spec.kind.name.lower().replace('_', ' ')}, expected tensors")
        tensor = exported.constants[name] if name in exported.constants else exported.state_dict[name]
        attribute = f"c{len(list(found.root.buffers()))}"
        found.root.register_buffer(attribute, tensor.detach())
        with graph.inserting_before(node):
            get = graph.create_node("get_attr", attribute)
        get.meta["val"] = node.meta["val"]
        get.meta["changed_inside"] = name if name in mutated_inside else ""
        node.replace_all_uses_with(get)
        graph.erase_node(node)
    # States follow the inputs.
    for node in found.states.values():
        found.inputs[-1].append(node) if found.inputs else None
    for earlier, later in zip(list(found.states.values()), list(found.states.values())[1:], strict=False):
        earlier.append(later)


# A call may matter for the state that it changes alone: dead-code elimination must leave it.
has_side_effect(BOUNDARY)


def _cut_out(graph: fx.Graph, calls: Sequence[Call], bodies: _Bodies) -> dict[fx.Node, Call]:
    """Let boundary nodes compute nothing themselves: what made their outputs is dead then, and goes."""
    boundaries: dict[fx.Node, Call] = {}
    # By identity: a module may have several names.
    stateful = {
        id(bodies.module(bodies.of_buffer(node.meta["changed_inside"])))
        for node in graph.nodes
        if node.meta.get("changed_inside")
    }
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is BOUNDARY:
            inputs, _, number = node.args
            node.args = (inputs, [], number)
            boundaries[node] = calls[number]
            node.meta[IN_ORDER] = id(calls[number].match.module) in stateful
    for node in reversed(list(graph.nodes)):
        is_computed = node.op in ("call_function", "get_attr")
        if not is_computed or node.users:
            continue
        called = boundaries[node].match.module if node in boundaries else None
        if called is not None and called is bodies.module(bodies.of_node(node)) and id(called) in stateful:
            continue
        graph.erase_node(node)
        boundaries.pop(node, None)
    return boundaries


def _check_states(what: str, graph: fx.Graph, bodies: _Bodies) -> None:
    """Refuse a buffer that a named module changes and that is used outside it too."""
    for node in graph.nodes:
        if name := node.meta.get("changed_inside"):
            owner = bodies.of_buffer(name)
            if any(bodies.of_node(user) != owner for user in node.users):
                raise SplitError(
                    f"{what}: uses buffer {name.removeprefix(MODULE + '.')!r}, which {owner!r} changes; return it "
                    "from there, or name the module that has the buffer in the policy"
                )


def _is_random(node: Any) -> bool:
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(dropout)
    if str(node.target) in (
        "aten.lstm.input",
        "aten.gru.input",
        "aten.rnn_tanh.input",
        "aten.rnn_relu.input",
    ):
        dropout, is_training = node.args[5:7]
        return bool(dropout and is_training)
    is_dropout = node.target is torch.ops.aten.dropout.default
    return is_dropout or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _check(what: str, graph: fx.Graph, bodies: _Bodies) -> None:
    """Refuse what a program cannot hold."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target in (BOUNDARY, operator.getitem):
            continue
        if _is_random(node):
            raise SplitError(
                f"{what}: {node.target} draws random numbers; call module.eval() before compiling, or take the "
                "randomness as an argument"
            )
        if "_native_batch_norm_legit" in str(node.target) and "no_training" not in str(node.target):
            raise SplitError(
                f"{what}: has a batch norm in training mode, whose statistics are those of each call; call "
                "module.eval() before compiling"
            )
        leaked = bodies.of_node(node)
        if leaked is not None and isinstance(node.meta.get("val"), Tensor):
            raise SplitError(
                f"{what}: a tensor computed inside {leaked!r} is used outside it ({node.target}) without being "
                "returned; return it from that module's forward (what a forward hook of it computes counts as outside)"
            )


def _symbols(
    exported: torch.export.ExportedProgram, inputs: Sequence[fx.Node], leaves: Sequence[Leaf]
) -> tuple[dict[sympy.Symbol, str], tuple[Range, ...]]:
    """Names and ranges of the symbols of the inputs' sizes: a Dim's name, or that of the axis."""
    names: dict[sympy.Symbol, str] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            expression = size.node.expr
            dim: Any = leaf.axes.get(axis)
            is_dim, is_derived = isinstance(dim, Dim), hasattr(dim, "root")
            if isinstance(expression, sympy.Symbol) and expression not in names:
                name = "".join(c if c.isalnum() else "_" for c in leaf.path) + f"_{axis}"
                name = dim.__name__ if is_dim and not is_derived else name
                while name in names.values():
                    name += "_"
                names[expression] = name
            elif is_dim and is_derived and len(expression.free_symbols) == 1:
                (symbol,) = expression.free_symbols
                names.setdefault(symbol, dim.root.__name__)
    ranges = []
    least = _least(inputs, leaves)
    for symbol, name in names.items():
        bounds = exported.range_constraints[symbol]
        if not bounds.upper.is_Integer:
            raise PolicyError(
                f"dim {name!r} has no largest size, and a dynamic method is planned for one; give the axis a "
                "Dim(name, min=…, max=…)"
            )
        ranges.append(Range(name, least.get(symbol, int(bounds.lower)), int(bounds.upper)))
    return names, tuple(ranges)


def _least(inputs: Sequence[fx.Node], leaves: Sequence[Leaf]) -> dict[sympy.Symbol, int]:
    """The least size that each symbol's dims allow; torch itself assumes at least 2 of some."""
    least: dict[sympy.Symbol, int] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, dim in leaf.axes.items():
            size = node.meta["val"].shape[axis]
            low = getattr(getattr(dim, "root", dim), "min", None)
            symbols = set() if isinstance(size, int) else size.node.expr.free_symbols
            if isinstance(low, int) and len(symbols) == 1:
                (symbol,) = symbols
                least[symbol] = max(1, low, least.get(symbol, 1))
    return least
