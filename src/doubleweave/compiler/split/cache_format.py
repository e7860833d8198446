"""Keep keys and values in another format than float32: what appends to the cache writes it, attention reads it.

A segment on the CPU that computes keys or values writes them in the cache's format itself, so that appending stays a
binding. One on another device gives float32, and a small segment behind it writes the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.cache_rows import stored
from doubleweave.compiler.graph.nodes import insert, is_call, output_node
from doubleweave.compiler.graph.ops import ATTENTIONS, CACHE_ROWS, CROSS
from doubleweave.compiler.policy import KERNELS_BACKEND
from doubleweave.compiler.split.pieces import TorchSplit, derived_structure, with_weights
from doubleweave.compiler.split.transform import copy_graph
from doubleweave.compiler.split.weights import JoinedWeights
from doubleweave.ir.cache_format import SCALE_BYTES, heads_of
from doubleweave.ir.split import CACHED, ROWS, Call, Port, Segment, Value, most_rows, rows

_PART = "cache"  # what the segments that store rows are named by


class _Stored(NamedTuple):
    """A value of the cache in its new format, which has `heads` key-value heads."""

    value: Value
    heads: int


def with_cache_format(torch_split: TorchSplit, dtype: str) -> TorchSplit:
    """The split with a cache in a format (ir.cache_format), of whatever nothing but our attention operators reads.

    Returns the split itself where there is no such value.
    """
    stored = _stored(torch_split, dtype) if dtype != "float32" else {}
    if not stored:
        return torch_split
    return _Rewriter(torch_split, stored).result()


def in_format(rows: Tensor, value: Value) -> Tensor:
    """Float32 rows [1, T, K*D] as a value of the cache keeps them."""
    return stored(rows, heads_of(value)[0], getattr(torch, value.dtype))


def _stored(torch_split: TorchSplit, dtype: str) -> dict[str, _Stored]:
    """The values to store, by name."""
    split = torch_split.split
    attentions = {s.name: node for s in split.segments if (node := _attention(torch_split, s)) is not None}
    found = {value.name: _Stored(value, 0) for value in split.values if value.kind == "cache"}
    # A segment serves several layers: where one of its keys stays as it is, all of them do.
    while True:
        kept = set()
        for call in split.calls:
            read = [name for name in call.reads if name in found]
            if call.segment not in attentions or not all(name in found for name in call.reads[1:3]):
                kept |= set(read)
                continue
            heads = attentions[call.segment].args[4]
            for name in read:
                if found[name].heads in (0, heads):
                    found[name] = found[name]._replace(heads=heads)
                else:
                    kept.add(name)
        if not kept:
            break
        found = {name: each for name, each in found.items() if name not in kept}
    return {name: each._replace(value=_in_format(each, dtype)) for name, each in found.items() if each.heads}


def _attention(torch_split: TorchSplit, segment: Segment) -> Any:
    """The operator of a segment that is attention over a cache that grows, None for other segments."""
    graph = torch_split.graphs[segment.structure].graph
    for node in graph.nodes:
        if is_call(node, *ATTENTIONS) and node.target is not CROSS and CACHED in segment.inputs[-1].shape:
            return node
    return None


def _in_format(stored: _Stored, dtype: str) -> Value:
    value = stored.value
    if dtype != "int8":
        return replace(value, dtype=dtype)
    *first, width = value.shape
    return replace(value, dtype=dtype, shape=(*first, stored.heads, int(width) // stored.heads + SCALE_BYTES))


class _Rewriter:
    def __init__(self, torch_split: TorchSplit, stored: Mapping[str, _Stored]) -> None:
        self._old, self._stored = torch_split, stored
        self._graphs = dict(torch_split.graphs)
        self._segments = {segment.name: segment for segment in torch_split.split.segments}
        self._storing: list[Segment] = []
        self._more_values: list[Value] = []

    def result(self) -> TorchSplit:
        split = self._old.split
        calls = [new for call in split.calls for new in self._calls(call)]
        values = [self._stored[v.name].value if v.name in self._stored else v for v in split.main.values]
        main = replace(split.main, calls=tuple(calls), values=(*values, *self._more_values))
        segments = (*self._segments.values(), *self._storing)
        # They have no weights.
        weights = {
            "": self._old.weights,
            _PART: {s.name.removeprefix(f"{_PART}."): () for s in self._storing},
        }
        new = replace(split, segments=segments, functions=(main, *split.functions[1:]))
        return replace(self._old, split=new, graphs=self._graphs, weights=JoinedWeights(weights))

    def _calls(self, call: Call) -> Iterator[Call]:
        """The call, and behind it the one that stores what it computed, where it cannot do that itself."""
        segment = self._old.split.segment(call.segment)
        if any(name in self._stored for name in call.reads):
            self._read(segment, call)
        written = [name for name in call.writes if name in self._stored]
        if not written:
            yield call
        elif segment.device == "cpu":
            self._write(segment, call)
            yield call
        else:
            names = {name: f"{name}.float32" for name in written}
            self._more_values += [
                replace(self._old.split.main.value(name), name=new, kind="chunk", window=0)
                for name, new in names.items()
            ]
            yield replace(call, writes=tuple(names.get(name, name) for name in call.writes))
            name = self._storing_segment(segment, written)
            yield Call(f"store_{call.name}", name, tuple(names.values()), tuple(written))

    def _read(self, segment: Segment, call: Call) -> None:
        def port(old: Port, name: str) -> Port:
            return _port(old, self._stored[name].value) if name in self._stored else old

        inputs = tuple(map(port, segment.inputs, call.reads))
        digest = derived_structure(segment.structure, [each.dtype for each in inputs])
        if digest not in self._graphs:
            graph = copy_graph(self._old.graphs[segment.structure])
            for node, each in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
                if each.dtype != "float32":
                    heads = next(self._stored[name].heads for name in call.reads if name in self._stored)
                    node.meta["val"] = CACHE_ROWS(node.meta["val"], heads, getattr(torch, each.dtype))
            self._graphs[digest] = fx.GraphModule(self._old.graphs[segment.structure], graph)
        self._segments[segment.name] = replace(segment, inputs=inputs, structure=digest)

    def _write(self, segment: Segment, call: Call) -> None:
        """The segment with the rows that it writes in the cache's format."""
        found = [self._stored.get(name) for name in call.writes]
        outputs = tuple(
            _port(port, each.value) if each else port
            for port, each in zip(segment.outputs, found, strict=True)
        )
        digest = derived_structure(
            segment.structure, [each and (each.value.dtype, each.heads) for each in found]
        )
        if digest not in self._graphs:
            graph = copy_graph(self._old.graphs[segment.structure])
            output = output_node(graph)
            with graph.inserting_before(output):
                results = [
                    insert(graph, CACHE_ROWS, node, each.heads, getattr(torch, each.value.dtype), like=node)
                    if each
                    else node
                    for node, each in zip(output.args[0], found, strict=True)
                ]
            output.args = (tuple(results),)
            self._graphs[digest] = fx.GraphModule(self._old.graphs[segment.structure], graph)
        self._segments[segment.name] = replace(segment, outputs=outputs, structure=digest)

    def _storing_segment(self, segment: Segment, written: list[str]) -> str:
        """The name of the segment that stores these values, which a segment on another device computed."""
        values = [self._old.split.main.value(name) for name in written]
        stored = [self._stored[name] for name in written]
        inputs = tuple(Port(f"in{i}", "float32", value.shape) for i, value in enumerate(values))
        outputs = tuple(Port(f"out{i}", s.value.dtype, s.value.shape) for i, s in enumerate(stored))
        heads = [each.heads for each in stored]
        digest = derived_structure("", [heads, *inputs, *outputs])
        for found in self._storing:
            if found.structure == digest:
                return found.name
        graph = fx.Graph()
        given = [graph.placeholder(port.name) for port in inputs]
        results = [
            graph.call_function(CACHE_ROWS, (node, each.heads, getattr(torch, each.value.dtype)))
            for node, each in zip(given, stored, strict=True)
        ]
        graph.output(tuple(results))
        self._graphs[digest] = with_weights(graph, ())
        name = f"{_PART}.rows{len(self._storing) or ''}"
        shape = rows(1, most_rows(segment.shape))
        self._storing.append(Segment(name, "cpu", KERNELS_BACKEND, shape, inputs, outputs, digest))
        return name


def _port(port: Port, value: Value) -> Port:
    """A port that takes a value of the cache: all rows so far, or those of the chunk."""
    axis = port.shape[1]
    return Port(port.name, value.dtype, tuple(axis if size == ROWS else size for size in value.shape))
