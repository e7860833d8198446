"""The plan of a run of a module: its methods in order, and where every tensor lies, for given sizes.

A function's calls are laid out one behind the other, nested functions in place, a chunked segment chunk by chunk.
A tensor's buffer is free again after its last reader. Plain data: it knows nothing of threads or ExecuTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from doubleweave.errors import InputError
from doubleweave.ir.sizes import evaluate, shape_of, solve, symbols, text
from doubleweave.ir.split import ITEM_BYTES, ROWS, Call, FixedSizes, Function, Port, Range, Split, Value
from doubleweave.schedule.chunks import cut

Place = Literal["input", "output", "state", "buffer"]


@dataclass
class Tensor:
    """A tensor of a run. `place` says whose memory it is in: the caller's (input, output), the session's (state),
    or a buffer of the run; `number` which one. Writers (several where it is written chunk by chunk) and readers are
    numbers of steps."""

    name: str
    dtype: str
    sizes: tuple[int, ...]
    place: Place
    number: int = -1
    writers: list[int] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class View:
    """A tensor, or some of its rows: `offset` bytes from its beginning, `sizes` elements."""

    tensor: int
    sizes: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Copy:
    """Blocks copied from one tensor to another, `pad_bytes` zeros behind each; offsets and strides in bytes."""

    source: int
    target: int
    source_offset: int
    source_stride: int
    target_offset: int
    target_stride: int
    num_blocks: int
    block_bytes: int
    pad_bytes: int


@dataclass(frozen=True)
class Step:
    """One run of a method, or a copy; `name` is the path of the call, "block/attention_0"."""

    name: str
    segment: str
    method: str
    device: str
    chunk: int
    reads: tuple[View, ...] = ()
    writes: tuple[View, ...] = ()
    copy: Copy | None = None


@dataclass(frozen=True)
class Plan:
    """`outputs` are the tensors of the function's results. `updates` counts how often each state changes:
    its two buffers swap each time. `buffer_bytes` are the sizes of the run's buffers."""

    function: str
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    updates: dict[str, int]
    buffer_bytes: tuple[int, ...]

    def methods(self) -> list[str]:
        return sorted({step.method for step in self.steps if step.method})

    def last_use(self, tensor: int) -> int | None:
        """The step after which a tensor is no longer needed."""
        found = self.tensors[tensor]
        return max((*found.readers, *found.writers), default=None)

    def peak_bytes(self) -> int:
        """The most bytes of buffers that are in use at one time; what no plan can be below."""
        most = 0
        for step in range(len(self.steps)):
            alive = 0
            for index, tensor in enumerate(self.tensors):
                last = self.last_use(index)
                if tensor.place == "buffer" and tensor.writers and last is not None:
                    alive += tensor.num_bytes if tensor.writers[0] <= step <= last else 0
            most = max(most, alive)
        return most


def symbols_of(function: Function, name: str, found: Sequence[tuple[str, Sequence[int]]]) -> dict[str, int]:
    """The sizes of a function's symbols for inputs of these dtypes and shapes.

    Raises InputError that names the input, what was found and what is allowed.
    """
    known: dict[str, int] = {}
    ranges = {r.symbol: r for r in function.ranges}
    # Plain symbols first: expressions follow from them.
    for is_plain in (True, False):
        for value, (dtype, sizes) in zip(function.inputs, found, strict=True):
            where = f"{name}, {value.name}"
            if dtype != value.dtype:
                raise InputError(f"{where}: found dtype {dtype}, expected {value.dtype}")
            if len(sizes) != len(value.shape):
                raise InputError(f"{where}: found shape {text(sizes)}, expected {_allowed(value, ranges)}")
            for size, number in zip(value.shape, sizes, strict=True):
                if (size in ranges or isinstance(size, int)) != is_plain:
                    continue
                before = dict(known)
                if not solve(size, number, known):
                    given = ", ".join(f"{s} = {before[s]}" for s in sorted(symbols(size)) if s in before)
                    raise InputError(
                        f"{where}: found shape {text(sizes)}, expected {_allowed(value, ranges)}"
                        + (f", where {given} from what came before" if given else "")
                    )
                for symbol in symbols(size):
                    _, low, high = ranges[symbol]
                    if not evaluate(low, known) <= known[symbol] <= high:
                        raise InputError(
                            f"{where}: found shape {text(sizes)}, expected {_allowed(value, ranges)}: {symbol} is "
                            f"{known[symbol]}"
                        )
    return known


def _allowed(value: Value, ranges: Mapping[str, Range]) -> str:
    used = sorted({symbol for size in value.shape for symbol in symbols(size)})
    bounds = ", ".join(f"{s} in {ranges[s][1]}..{ranges[s][2]}" for s in used)
    return text(value.shape) + (f" with {bounds}" if bounds else "")


def make(split: Split, function: Function, name: str, found: Sequence[tuple[str, Sequence[int]]]) -> Plan:
    """Plan a run of `function` for inputs of these dtypes and shapes; InputError where they do not fit."""
    symbols_of(function, name, found)
    builder = _Builder(split)
    inputs = [
        builder.tensor(value.name, dtype, tuple(sizes), "input", index)
        for index, (value, (dtype, sizes)) in enumerate(zip(function.inputs, found, strict=True))
    ]
    outputs = builder.results(builder.run(function, inputs, "", found), function)
    buffers = builder.place_buffers()
    updates = {state: count for state, count in builder.version.items() if count}
    return Plan(
        function.name,
        tuple(builder.tensors),
        tuple(builder.steps),
        tuple(inputs),
        tuple(outputs),
        updates,
        tuple(buffers),
    )


class _Builder:
    def __init__(self, split: Split) -> None:
        self.segments = {segment.name: segment for segment in split.segments}
        self.functions = {function.name: function for function in split.functions}
        self.tensors: list[Tensor] = []
        self.steps: list[Step] = []
        self.version: dict[str, int] = {}
        self.state_tensor: dict[tuple[str, int], int] = {}

    def tensor(
        self, name: str, dtype: str, sizes: tuple[int, ...], place: Place = "buffer", number: int = -1
    ) -> int:
        self.tensors.append(Tensor(name, dtype, sizes, place, number))
        return len(self.tensors) - 1

    def run(
        self,
        function: Function,
        inputs: Sequence[int],
        path: str,
        found: Sequence[tuple[str, Sequence[int]]],
    ) -> list[int]:
        """Lay out a function's calls; returns the tensors of its results."""
        known = symbols_of(function, path or function.name, found)
        names = {value.name: tensor for value, tensor in zip(function.inputs, inputs, strict=True)}
        values = {value.name: value for value in function.values}
        next_of = dict(function.states)
        for state in function.states:
            names[state.value] = self._state(values[state.value], 0)
        changed: set[str] = set()
        # What a segment writes as one state's next value goes straight to the state's other buffer.
        state_of: dict[str, str] = {}
        for call in function.calls:
            for state in function.states if call.callee == "segment" else ():
                if state.next in call.writes:
                    state_of.setdefault(state.next, state.value)
        for call in function.calls:
            reads = [names[name] for name in call.reads]
            if call.callee == "function":
                given = [(self.tensors[t].dtype, self.tensors[t].sizes) for t in reads]
                results = self.run(self.functions[call.segment], reads, f"{path}{call.name}/", given)
                names.update(zip(call.writes, results, strict=True))
                continue
            for name in call.writes:
                if name in state_of:
                    names[name] = self._state(values[state_of[name]], 1)
                else:
                    sizes = shape_of(values[name].shape, known)
                    names[name] = self.tensor(_path(path, function, name), values[name].dtype, sizes)
            counted = self._segment(call, _path(path, function, call.name), names, next_of, values)
            for changing in counted:  # chunk by chunk: the last chunk's update is the next value
                names[next_of[changing]] = self._state(values[changing], 0)
            changed |= counted
        # A state that is returned is copied, before a later update takes its buffer.
        results = [
            self._copied(names[name], _path(path, function, name))
            if path and self.tensors[names[name]].place == "state"
            else names[name]
            for name in function.outputs
        ]
        for state in function.states:
            if state.value in changed:
                continue
            target = self._state(values[state.value], 1)
            if names[state.next] != target:
                self._copy_whole(names[state.next], target, f"state {state.value}")
            self.version[state.value] = self.version.get(state.value, 0) + 1
        return results

    def _copied(self, tensor: int, name: str) -> int:
        found = self.tensors[tensor]
        target = self.tensor(name, found.dtype, found.sizes)
        self._copy_whole(tensor, target, name)
        return target

    def _copy_whole(self, source: int, target: int, name: str) -> None:
        size = self.tensors[source].num_bytes
        copy = Copy(source, target, 0, size, 0, size, 1, size, 0)
        self._step(Step(name, "", "", "cpu", 0, copy=copy))

    def _state(self, value: Value, ahead: int) -> int:
        """A state as it is now (0) or as the next update leaves it (1); its two buffers take turns."""
        which = (self.version.setdefault(value.name, 0) + ahead) % 2
        key = (value.name, which)
        if key not in self.state_tensor:
            sizes = shape_of(value.shape, {})
            self.state_tensor[key] = self.tensor(value.name, value.dtype, sizes, "state", which)
        return self.state_tensor[key]

    def _segment(
        self,
        call: Call,
        name: str,
        names: Mapping[str, int],
        next_of: Mapping[str, str],
        values: Mapping[str, Value],
    ) -> set[str]:
        """Lay out a call of a segment; returns the states whose updates it has counted."""
        segment = self.segments[call.segment]
        if not (isinstance(segment.shape, FixedSizes) and segment.shape.sizes):
            reads = tuple(self._whole(names[n]) for n in call.reads)
            writes = tuple(self._whole(names[n]) for n in call.writes)
            self._step(Step(name, segment.name, segment.name, segment.device, 0, reads, writes))
            return set()
        states = [n for n in call.reads if n in next_of] + [v for v, n in next_of.items() if n in call.writes]
        rows = max(self._rows(port, names[n]) for port, n in zip(segment.inputs, call.reads, strict=True))
        chunks = _exact(rows, segment.shape.sizes) if states else cut(rows, segment.shape)
        state_of = {after: before for before, after in next_of.items()}
        for index, (start, count, size) in enumerate(chunks):
            before: list[Copy] = []
            after: list[Copy] = []
            views_in, views_out = [], []
            for port, n in zip(segment.inputs, call.reads, strict=True):
                tensor = self._state(values[n], 0) if n in next_of else names[n]
                view, copies = self._chunk(port, tensor, index, (start, count, size))
                views_in.append(view)
                before += copies[:1] if copies else ()
            for port, n in zip(segment.outputs, call.writes, strict=True):
                tensor = self._state(values[state_of[n]], 1) if n in state_of else names[n]
                view, copies = self._chunk(port, tensor, index, (start, count, size))
                views_out.append(view)
                after += copies[1:] if copies else ()
            for copy in before:
                self._step(Step(name, segment.name, "", segment.device, index, copy=copy))
            method = f"{segment.name}@{size}"
            self._step(
                Step(name, segment.name, method, segment.device, index, tuple(views_in), tuple(views_out))
            )
            for copy in after:
                self._step(Step(name, segment.name, "", segment.device, index, copy=copy))
            for state in {state_of[n] for n in call.writes if n in state_of}:
                self.version[state] += 1
        return {state_of[n] for n in call.writes if n in state_of}

    def _rows(self, port: Port, tensor: int) -> int:
        return self.tensors[tensor].sizes[port.shape.index(ROWS)] if ROWS in port.shape else 0

    def _whole(self, tensor: int) -> View:
        return View(tensor, self.tensors[tensor].sizes)

    def _chunk(
        self, port: Port, tensor: int, index: int, chunk: tuple[int, int, int]
    ) -> tuple[View, tuple[Copy, Copy] | None]:
        """A chunk's rows of a tensor: where they lie, or beside it, and then the copies there and back.

        The copy there puts zeros behind the rows, the one back leaves the padding out.
        """
        if ROWS not in port.shape:
            return self._whole(tensor), None
        start, count, size = chunk
        lead, row_bytes, sizes = self._layout(port, tensor, size)
        if lead == 1 and count == size:
            return View(tensor, sizes, start * row_bytes), None
        staged = self.tensor(f"{self.tensors[tensor].name}/{index}", port.dtype, sizes)
        rows = self.tensors[tensor].sizes[port.shape.index(ROWS)]
        begin, stride, staged_stride = start * row_bytes, rows * row_bytes, size * row_bytes
        block, padding = count * row_bytes, (size - count) * row_bytes
        there = Copy(tensor, staged, begin, stride, 0, staged_stride, lead, block, padding)
        back = Copy(staged, tensor, 0, staged_stride, begin, stride, lead, block, 0)
        return self._whole(staged), (there, back)

    def _layout(self, port: Port, tensor: int, size: int) -> tuple[int, int, tuple[int, ...]]:
        """(blocks of rows, bytes of a row, the sizes of a chunk) of a tensor."""
        axis = port.shape.index(ROWS)
        sizes = self.tensors[tensor].sizes
        row_bytes = math.prod(sizes[axis + 1 :]) * ITEM_BYTES[self.tensors[tensor].dtype]
        return math.prod(sizes[:axis]), row_bytes, (*sizes[:axis], size, *sizes[axis + 1 :])

    def _step(self, step: Step) -> None:
        number = len(self.steps)
        reads = [view.tensor for view in step.reads]
        writes = [view.tensor for view in step.writes]
        if step.copy is not None:
            reads, writes = [step.copy.source], [step.copy.target]
        for tensor in reads:
            self.tensors[tensor].readers.append(number)
        for tensor in writes:
            self.tensors[tensor].writers.append(number)
        self.steps.append(step)

    def results(self, tensors: Sequence[int], function: Function) -> list[int]:
        """Let the caller own the results; what is an input or a state is copied."""
        outputs: list[int] = []
        owned: dict[int, int] = {}
        for tensor, name in zip(tensors, function.outputs, strict=True):
            found = self.tensors[tensor]
            if tensor not in owned:
                number = len(owned)
                if found.place == "buffer":
                    found.place, found.number = "output", number
                    owned[tensor] = tensor
                else:
                    owned[tensor] = self.tensor(name, found.dtype, found.sizes, "output", number)
                    self._copy_whole(tensor, owned[tensor], f"result {name}")
            outputs.append(owned[tensor])
        return outputs

    def place_buffers(self) -> list[int]:
        """Give every tensor of the run a buffer; one is taken again after the last reader of what it held."""
        begins: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            if tensor.place == "buffer" and tensor.writers:
                begins.setdefault(tensor.writers[0], []).append(index)
                ends.setdefault(max((*tensor.readers, *tensor.writers)), []).append(index)
        sizes: list[int] = []
        free: list[int] = []
        for step in range(len(self.steps)):
            for index in begins.get(step, []):
                tensor = self.tensors[index]
                fitting = [b for b in free if sizes[b] >= tensor.num_bytes]
                if fitting:
                    tensor.number = min(fitting, key=lambda b: sizes[b])
                    free.remove(tensor.number)
                elif free:  # grow the largest: cheaper than one more
                    tensor.number = max(free, key=lambda b: sizes[b])
                    free.remove(tensor.number)
                    sizes[tensor.number] = tensor.num_bytes
                else:
                    tensor.number = len(sizes)
                    sizes.append(tensor.num_bytes)
            for index in ends.get(step, []):
                free.append(self.tensors[index].number)
        return sizes


def _path(path: str, function: Function, name: str) -> str:
    """The name of a call or value inside a called function: "block_1/attention", not "block_1/block/attention"."""
    if not path:
        return name
    inner = name.removeprefix(function.name)
    return path[:-1] + inner if inner[:1] in ("", "'") or inner[1:].isdigit() else path + inner.lstrip(".")


def _exact(rows: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Chunks that add up without padding, largest first; 1 is among the sizes (rows.py)."""
    chunks, start = [], 0
    for size in sorted(sizes, reverse=True):
        while rows - start >= size:
            chunks.append((start, size, size))
            start += size
    return chunks
