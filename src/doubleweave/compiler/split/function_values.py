"""The values of one function: a name and a shape for every tensor that crosses the edge of a piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import insert, output_node
from doubleweave.compiler.split.call_sizes import Variant
from doubleweave.compiler.split.pieces import Piece
from doubleweave.compiler.trace.trace_data import Trace
from doubleweave.ir.split import Call, Function, Port, State, Value


def own_outputs(traced: Trace) -> None:
    """Copy weights that are results, next values of states or arguments of named modules: a call must write them."""
    graph, clone = traced.graph_module.graph, torch.ops.aten.clone.default
    for node in (output_node(graph), *traced.calls):
        given: Any = node.args[0]
        with graph.inserting_before(node):
            own = [
                insert(graph, clone, value, like=value) if value.op == "get_attr" else value
                for value in given
            ]
        node.args = (type(given)(own), *node.args[1:])


class Values:
    """The values of one function, by name and by node.

    `next_of` maps a state to the value that is its next one, `outputs` are the nodes of the function's results.
    """

    def __init__(self, variant: Variant, traced: Trace) -> None:
        self.variant, self.traced = variant, traced
        self.values: dict[str, Value] = {}
        self.name_of: dict[fx.Node, str] = {}
        graph = traced.graph_module.graph
        results: list[fx.Node] = list(output_node(graph).args[0])
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, leaf in zip(placeholders, traced.leaves, strict=False):
            self._add(node, leaf.path, "input")
        # States are named in the whole module: calls of one module under several functions share them.
        owner = f"{variant.match.name}." if variant.match.name else ""
        self.next_of: dict[str, str] = {}
        for node, state in zip(placeholders[len(traced.leaves) :], traced.states, strict=True):
            self._add(node, owner + state, "state")
            self.next_of[owner + state] = f"{owner}{state}.next"
        num_results = len(results) - len(traced.states)
        self.outputs = results[:num_results]
        for node, state in zip(results[num_results:], tuple(self.next_of), strict=True):
            # An argument or another state's next value has a name already; the run copies it.
            self._add(node, self.next_of[state], "chunk")
            self.next_of[state] = self.name_of[node]

    def _add(self, node: fx.Node, name: str, kind: Any) -> None:
        if node not in self.name_of:
            self.name_of[node] = self._new(name, node.meta["val"], kind)

    def _new(self, name: str, tensor: Tensor, kind: Any) -> str:
        """Make a value; returns its name, primed where another value has it."""
        while name in self.values:
            name += "'"
        shape = tuple(self.traced.size(size) for size in tensor.shape)
        self.values[name] = Value(name, str(tensor.dtype).removeprefix("torch."), shape, kind)
        return name

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
            named = [self.name_of[node] for node in readers if node in self.name_of]
            written = named[0] if named else self._new(stem, tensor, "output" if is_output else "chunk")
            self.name_of.update(dict.fromkeys(readers, written))
            writes.append(written)
        reads = tuple(self.name_of[node] for node in boundary.args[0])  # type: ignore[union-attr,index]
        return Call(name, callee, reads, tuple(writes), callee="function")

    def segment_call(self, piece: Piece, name: str, segment: str) -> Call:
        reads = tuple(self.name_of[node] for node in piece.reads)
        return Call(name, segment, reads, tuple(self.name_of[node] for node in piece.writes))

    def function(self, calls: Sequence[Call]) -> Function:
        return Function(
            name=self.variant.name,
            calls=tuple(calls),
            values=tuple(self.values.values()),
            outputs=tuple(self.name_of[node] for node in self.outputs),
            ranges=self.traced.ranges,
            states=tuple(State(*pair) for pair in self.next_of.items()),
            interface=self.traced.interface,
        )
