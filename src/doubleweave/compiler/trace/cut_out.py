"""From an ExportedProgram to a Trace: named modules cut out, buffers that change lifted, symbols named.

This module knows nothing of how the module was run.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import has_side_effect
from torch.utils._sympy.value_ranges import ValueRanges

from doubleweave.compiler.graph.fresh_tensors import without_empty
from doubleweave.compiler.graph.nodes import IN_ORDER
from doubleweave.compiler.graph.simplify import drop_no_ops
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.name_symbols import name_symbols, unify_dims
from doubleweave.compiler.trace.named_modules import NamedModules, named_modules
from doubleweave.compiler.trace.trace_data import BOUNDARY, MODULE, Call, Trace
from doubleweave.errors import SplitError
from doubleweave.ir.interface import Interface

aten = torch.ops.aten
_RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}


class _Unlifted(NamedTuple):
    """A graph whose weights are get_attr nodes of buffers of `root`.

    Placeholders are the inputs, then the states by name; `nested` are the get_attr nodes of buffers that a named
    module changes.
    """

    graph: fx.Graph
    root: nn.Module
    inputs: tuple[fx.Node, ...]
    states: dict[str, fx.Node]
    nested: dict[fx.Node, str]


def cut_out_calls(
    what: str,
    module: nn.Module,
    exported: torch.export.ExportedProgram,
    interface: Interface,
    leaves: tuple[Leaf, ...],
    calls: list[Call],
) -> Trace:
    """Make a Trace of an exported module; boundary nodes hold indices into `calls`.

    Raises SplitError for an operator that a program cannot run, PolicyError for a dim without a largest size.
    """
    _refuse_other_effects(what, exported)
    named = named_modules(module, [call.match.module for call in calls])
    unify_dims(exported, leaves)
    unlifted = _unlift(what, exported, *_updates(what, exported, named))
    graph = unlifted.graph
    _reshape_views(graph)
    _refuse_states_used_outside(what, unlifted, named)
    boundaries = _cut(unlifted, calls, named)
    graph_module = fx.GraphModule(unlifted.root, graph)
    drop_no_ops(graph_module)
    without_empty(graph_module)
    # After the cut: the insides of a named module are checked in that module's own trace.
    _refuse_nodes(what, graph, named)
    names, ranges = name_symbols(exported, unlifted.inputs, leaves)
    by_name = {r.symbol: r for r in ranges}
    for node, call in boundaries.items():
        # Not the shape environment's own bounds: it takes most sizes to be at least 2.
        call.ranges = {s: ValueRanges(by_name[n].low, by_name[n].high) for s, n in names.items()}
        call.inputs = tuple(source.meta["val"] for source in node.args[0])  # type: ignore[union-attr]
    states = tuple(map(_plain, unlifted.states))
    return Trace(graph_module, interface, leaves, states, boundaries, names, ranges)


def _plain(name: Any) -> str:
    """A buffer's name in the traced module."""
    return str(name).removeprefix(f"{MODULE}.")


def _refuse_other_effects(what: str, exported: torch.export.ExportedProgram) -> None:
    """Refuse branches on the values of tensors, and effects such as printing."""
    for node in exported.graph.nodes:
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if str(node.target) == "with_effects":
            raise SplitError(
                f"{what}: does something beside computing tensors, such as printing, which a program cannot; "
                "take it out"
            )
        raise SplitError(
            f"{what}: has {node.target} (data-dependent control flow), which a segment cannot hold; take the "
            "branch outside the module"
        )


def _updates(
    what: str, exported: torch.export.ExportedProgram, named: NamedModules
) -> tuple[set[str], set[str]]:
    """Names of the buffers that `forward` changes: the traced module's own, and those of named modules inside it."""
    own: set[str] = set()
    nested: set[str] = set()
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise SplitError(
                f"{what}: changes its argument in place; expected a module that leaves its arguments as they are: "
                "write into a clone"
            )
        if spec.kind is OutputKind.BUFFER_MUTATION:
            name = str(spec.target)
            _refuse_shared(what, (exported.constants | exported.state_dict)[name], named)
            # What a named module changes is a state of that module's function, not of this one.
            (own if named.of_buffer(name) is None else nested).add(name)
        elif spec.kind is not OutputKind.USER_OUTPUT:
            raise SplitError(
                f"{what}: changes {_plain(spec.target)!r} in forward, expected a buffer; make it one with "
                "register_buffer"
            )
    return own, nested


def _refuse_shared(what: str, buffer: Tensor, named: NamedModules) -> None:
    """Refuse a state shared by a named module and another module: each would have a state of its own."""
    owners = named.owners_of(buffer)
    if len({id(owner) for owner in owners.values()}) > 1:
        one, *_, other = sorted(owners, key=lambda name: named.of_buffer(name) is not None)
        raise SplitError(
            f"{what}: changes buffer {_plain(one)!r}, which is also {_plain(other)!r} in "
            f"{named.of_buffer(other)!r}; name the module that has the buffer in the policy"
        )


def _unlift(
    what: str, exported: torch.export.ExportedProgram, own_updates: set[str], nested_updates: set[str]
) -> _Unlifted:
    """Copy the exported graph with its weights, which torch.export lifts to inputs, as get_attr nodes again.

    The module's own states follow the inputs, and their next values the results.
    """
    graph, root = fx.Graph(), nn.Module()
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    specs = list(zip(exported.graph_signature.input_specs, placeholders, strict=True))
    # graph_copy leaves out what is copied already, so placeholders stand in the order in which they are made here.
    copied = {node: graph.node_copy(node) for spec, node in specs if spec.kind is InputKind.USER_INPUT}
    inputs = tuple(copied.values())
    states = {
        str(spec.target): copied.setdefault(node, graph.node_copy(node))
        for spec, node in specs
        if spec.kind is InputKind.BUFFER and spec.target in own_updates
    }
    nested: dict[fx.Node, str] = {}
    tensors = exported.state_dict | exported.constants
    for spec, node in specs:
        if node in copied:
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise SplitError(f"{what}: has a {spec.kind.name.lower().replace('_', ' ')}, expected tensors")
        name, attribute = str(spec.target), f"c{len(copied) - len(inputs) - len(states)}"
        root.register_buffer(attribute, tensors[name].detach())
        get = copied[node] = graph.create_node("get_attr", attribute)
        get.meta["val"] = node.meta["val"]
        if name in nested_updates:
            nested[get] = name
    results = graph.graph_copy(exported.graph, copied)
    outputs = list(zip(exported.graph_signature.output_specs, results, strict=True))  # type: ignore[arg-type]
    kept = [value for spec, value in outputs if spec.kind is OutputKind.USER_OUTPUT]
    after = {str(spec.target): value for spec, value in outputs if spec.kind is OutputKind.BUFFER_MUTATION}
    graph.output((*kept, *(after[name] for name in states)))
    return _Unlifted(graph, root, inputs, states, nested)


def _reshape_views(graph: fx.Graph) -> None:
    # At a segment's edge tensors become contiguous: what was a view of strided memory may have to copy.
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default


def _refuse_states_used_outside(what: str, unlifted: _Unlifted, named: NamedModules) -> None:
    """Refuse a buffer that a named module changes and that is used outside it too."""
    for node, name in unlifted.nested.items():
        owner = named.of_buffer(name)
        if any(named.of_node(user) != owner for user in node.users):
            raise SplitError(
                f"{what}: uses buffer {_plain(name)!r}, which {owner!r} changes; return it from there, or name the "
                "module that has the buffer in the policy"
            )


# A call may matter for the state that it changes alone: dead-code elimination must leave it.
has_side_effect(BOUNDARY)


def _cut(unlifted: _Unlifted, calls: Sequence[Call], named: NamedModules) -> dict[fx.Node, Call]:
    """Take the outputs of named modules from boundary nodes alone; the operators that computed them are dead and go."""
    graph = unlifted.graph
    # By identity: a module may have several names.
    stateful = {id(named.module(named.of_buffer(name))) for name in unlifted.nested.values()}
    boundaries: dict[fx.Node, Call] = {}
    for node in graph.find_nodes(op="call_function", target=BOUNDARY):
        inputs, _, number = node.args
        node.args = (inputs, [], number)
        boundaries[node] = calls[number]
        node.meta[IN_ORDER] = id(calls[number].match.module) in stateful
    for node in reversed(list(graph.nodes)):
        if node.op not in ("call_function", "get_attr") or node.users:
            continue
        called = boundaries[node].match.module if node in boundaries else None
        # A call whose results nobody uses stays where it changes a state, unless it is inside another named module.
        if called is not None and called is named.module(named.of_node(node)) and id(called) in stateful:
            continue
        graph.erase_node(node)
        boundaries.pop(node, None)
    return boundaries


def _is_random(node: Any) -> bool:
    # Attention and recurrent layers draw random numbers only if their own dropout is above 0.
    if node.target is aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(dropout)
    if node.target in _RECURRENT:
        dropout, is_training = node.args[5:7]
        return bool(dropout and is_training)
    return node.target is aten.dropout.default or torch.Tag.nondeterministic_seeded in getattr(
        node.target, "tags", ()
    )


def _refuse_nodes(what: str, graph: fx.Graph, named: NamedModules) -> None:
    """Refuse random numbers, statistics of a batch, and tensors that leave a named module other than as its result."""
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
        leaked = named.of_node(node)
        if leaked is not None and isinstance(node.meta.get("val"), Tensor):
            raise SplitError(
                f"{what}: a tensor computed inside {leaked!r} is used outside it ({node.target}) without being "
                "returned; return it from that module's forward (what a forward hook of it computes counts as outside)"
            )
