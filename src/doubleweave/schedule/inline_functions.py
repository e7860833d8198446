"""Inline functions: the calls of a function and of the functions that it calls, one behind the other, over tensors of
known sizes.

A function has symbols of its own, so its sizes are solved anew at each call. Updates of states are counted here. This
file knows nothing of buffers, and of chunks only their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from doubleweave.ir.sizes import Shape
from doubleweave.ir.split import ROWS, Call, FixedSizes, Function, Segment, Split, Value
from doubleweave.schedule.chunks import Chunk, cut
from doubleweave.schedule.module_steps import Tensor
from doubleweave.schedule.symbols import sizes_of, symbols_of


class FlatCall(NamedTuple):
    """A call of a segment over whole tensors, given by their numbers; without a segment, a copy.

    `chunks` says how a segment of fixed sizes takes its rows; it is empty for any other. `swaps` are the two tensors
    of each state that changes with every chunk: a chunk reads the tensor that the chunk before it wrote.
    """

    name: str
    segment: Segment | None
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()
    swaps: tuple[tuple[int, int], ...] = ()


class Flat(NamedTuple):
    """Calls in an order that can run. The inputs are the first tensors, `outputs` are the tensors of the results, and
    `updates` counts how often each state changes."""

    tensors: tuple[Tensor, ...]
    calls: tuple[FlatCall, ...]
    outputs: tuple[int, ...]
    updates: dict[str, int]


def inline(split: Split, function: Function, name: str, found: Sequence[tuple[str, Sequence[int]]]) -> Flat:
    """Lay out a run of `function`; raises InputError that begins with `name` where dtypes or shapes do not fit."""
    layout = _Layout(split)
    inputs = [
        layout.add(Tensor(value.name, dtype, tuple(sizes), "input", index))
        for index, (value, (dtype, sizes)) in enumerate(zip(function.inputs, found, strict=True))
    ]
    results = _lay_out(layout, function, inputs, name, "")
    outputs = _give_away(layout, results, function.outputs)
    updates = {state: count for state, count in layout.versions.items() if count}
    return Flat(tuple(layout.tensors), tuple(layout.calls), outputs, updates)


@dataclass
class _Layout:
    """Tensors and calls laid out so far, and how often each state has changed."""

    split: Split
    tensors: list[Tensor] = field(default_factory=list)
    calls: list[FlatCall] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    states: dict[tuple[str, int], int] = field(default_factory=dict)  # (name, which buffer) -> tensor

    def add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def state(self, value: Value, ahead: int) -> int:
        """The tensor of a state as it is now (0) or as the next update leaves it (1).

        A state has two buffers that take turns: an update must not overwrite the value that later calls still read.
        """
        which = (self.versions.setdefault(value.name, 0) + ahead) % 2
        key = (value.name, which)
        if key not in self.states:
            self.states[key] = self.add(
                Tensor(value.name, value.dtype, sizes_of(value, {}, "states"), "state", which)
            )
        return self.states[key]

    def copy(self, source: int, target: int, name: str) -> int:
        self.calls.append(FlatCall(name, None, (source,), (target,)))
        return target


def _lay_out(layout: _Layout, function: Function, inputs: Sequence[int], where: str, path: str) -> list[int]:
    """Lay out a function's calls; returns the tensors of its results. Names inside a called one begin with `path`."""
    found = [(tensor.dtype, tensor.sizes) for tensor in map(layout.tensors.__getitem__, inputs)]
    known = symbols_of(function, where, found)
    values = {value.name: value for value in function.values}
    names = {value.name: tensor for value, tensor in zip(function.inputs, inputs, strict=True)}
    names |= {state.value: layout.state(values[state.value], 0) for state in function.states}
    # Where two states take the same value, the first has it written and the other copied.
    state_of = {state.next: values[state.value] for state in reversed(function.states)}
    # States that were updated chunk by chunk: their versions are counted already, and may end in either buffer.
    chunked: set[str] = set()
    numbers: dict[Shape, tuple[int, ...]] = {}  # evaluating is slow, and most values have one of few shapes
    for call in function.calls:
        if call.callee == "function":
            inner = f"{path}{call.name}/"
            callee = layout.split.function(call.segment)
            results = _lay_out(layout, callee, [names[name] for name in call.reads], inner, inner)
            names.update(zip(call.writes, results, strict=True))
            continue
        for name in call.writes:
            if name in state_of:  # written straight to the state's other buffer
                names[name] = layout.state(state_of[name], 1)
            else:
                value = values[name]
                if value.shape not in numbers:
                    numbers[value.shape] = sizes_of(value, known, where.rstrip("/"))
                tensor = Tensor(_named(path, function, name), value.dtype, numbers[value.shape])
                names[name] = layout.add(tensor)
        flat = _flat_call(layout, function, call, names, path)
        layout.calls.append(flat)
        for name in call.writes if flat.chunks else ():
            if name in state_of:  # the last chunk's update is the state's next value
                layout.versions[state_of[name].name] += len(flat.chunks)
                names[name] = layout.state(state_of[name], 0)
                chunked.add(state_of[name].name)
    results = [names[name] for name in function.outputs]
    # The whole model's results are given to the caller (`_give_away`), so nothing need be kept from its next call.
    if path:
        results = [
            _kept(layout, tensor, _named(path, function, name))
            for tensor, name in zip(results, function.outputs, strict=True)
        ]
    for state in function.states:
        if state.value not in chunked:
            target = layout.state(values[state.value], 1)
            # No segment of this function wrote it: it is an input, another state, a nested function's result.
            if names[state.next] != target:
                layout.copy(names[state.next], target, f"state {state.value}")
            layout.versions[state.value] += 1
    return results


def _kept(layout: _Layout, tensor: int, name: str) -> int:
    """A result of a called function; a state is copied, as the function's next call may write its buffer."""
    found = layout.tensors[tensor]
    if found.place != "state":
        return tensor
    return layout.copy(tensor, layout.add(Tensor(name, found.dtype, found.sizes)), name)


def _flat_call(layout: _Layout, function: Function, call: Call, names: dict[str, int], path: str) -> FlatCall:
    segment = layout.split.segment(call.segment)
    reads, writes = tuple(map(names.__getitem__, call.reads)), tuple(map(names.__getitem__, call.writes))
    name = _named(path, function, call.name)
    if not (isinstance(segment.shape, FixedSizes) and segment.shape.sizes):
        return FlatCall(name, segment, reads, writes)
    rows = max(
        layout.tensors[tensor].sizes[port.shape.index(ROWS)]
        for port, tensor in zip(segment.inputs, reads, strict=True)
        if ROWS in port.shape
    )
    swaps = tuple(
        (names[state.value], names[state.next]) for state in function.states if state.next in call.writes
    )
    # Padding would reach the state: a cache would grow by it, a running mean would count it.
    is_exact = swaps or any(state.value in call.reads for state in function.states)
    chunks = _exact(rows, segment.shape.sizes) if is_exact else cut(rows, segment.shape)
    return FlatCall(name, segment, reads, writes, chunks, swaps)


def _exact(rows: int, sizes: Sequence[int]) -> tuple[Chunk, ...]:
    """Chunks that add up without padding, largest first; 1 is among the sizes (rows.py)."""
    chunks, start = [], 0
    for size in sorted(sizes, reverse=True):
        while rows - start >= size:
            chunks.append(Chunk(start, size, size))
            start += size
    return tuple(chunks)


def _give_away(layout: _Layout, results: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    """Let the caller own the results: they are written to its memory; an input or a state is copied there, because
    the caller may change its result, and the session its state."""
    owned: dict[int, int] = {}  # a function may return a value twice
    for tensor, name in zip(results, names, strict=True):
        if tensor in owned:
            continue
        found = layout.tensors[tensor]
        output = found._replace(place="output", number=len(owned))
        if found.place == "buffer":
            layout.tensors[tensor] = output
            owned[tensor] = tensor
        else:
            owned[tensor] = layout.copy(tensor, layout.add(output._replace(name=name)), f"result {name}")
    return tuple(owned[tensor] for tensor in results)


def _named(path: str, function: Function, name: str) -> str:
    """The name of a call or value inside a called function: "block_1/attention", not "block_1/block/attention"."""
    if not path:
        return name
    inner = name.removeprefix(function.name)
    return path[:-1] + inner if inner[:1] in ("", "'") or inner[1:].isdigit() else path + inner.lstrip(".")
