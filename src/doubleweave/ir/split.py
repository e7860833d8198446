"""The split: segments, calls and values, the whole model as a small frozen graph.

Plain data that prints and diffs; manifest.py writes and reads it by its annotations. The compiler hands it to the run
time, so it knows nothing of torch or ExecuTorch.

Sizes in shapes are numbers, symbols or expressions of symbols (sizes.py). In a language model "T" is the rows of
the chunk at hand, "S" the rows of the cache up to and including that chunk and "E" the rows that an encoder gave; in
any other module the symbols
are those of its function, and "T" is the dim along which a chunked segment is cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from doubleweave.ir.interface import Interface
from doubleweave.ir.sizes import Shape as Shape
from doubleweave.ir.sizes import Size, text

ROWS, CACHED, ENCODED = "T", "S", "E"

# The function of a language model's program that computes its "encoded" values, in their order, once a sequence.
ENCODER = "encoder"

ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Range(NamedTuple):
    """A symbol and the sizes it may have, both ends included; `low` may be another symbol."""

    symbol: str
    low: Size
    high: int


@dataclass(frozen=True)
class FixedSizes:
    """Fixed sizes, as an NPU compiles them: a method for each size of "T", to which a chunk is padded up.

    Without sizes there is no "T": every size is fixed, and there is one method.
    """

    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class SizeRanges:
    """One method for every size in the ranges of its symbols."""

    ranges: tuple[Range, ...]

    def range(self, symbol: str) -> Range:
        """The range of a symbol; KeyError when the shape does not have it."""
        return {found.symbol: found for found in self.ranges}[symbol]


def rows(low: int, high: int, max_cached: int = 0, max_encoded: int = 0) -> SizeRanges:
    """The shape of a language model's segments: `low` to `high` rows, a cache of up to `max_cached`, or up to
    `max_encoded` rows of an encoder."""
    cached = (Range(CACHED, ROWS, max_cached),) if max_cached else ()
    encoded = (Range(ENCODED, 1, max_encoded),) if max_encoded else ()
    return SizeRanges((Range(ROWS, low, high), *cached, *encoded))


def whole_cache(port: Port) -> int:
    """The rows of a port that takes a cache of fixed length, all of it; 0 for any other port."""
    is_fixed = len(port.shape) == 3 and all(isinstance(size, int) for size in port.shape)
    return int(port.shape[1]) if is_fixed else 0


def most_rows(shape: FixedSizes | SizeRanges) -> int:
    """The most rows of a call."""
    return max(shape.sizes) if isinstance(shape, FixedSizes) else shape.range(ROWS).high


class Traffic(NamedTuple):
    """Bytes between the device's own memory and the system's in one run of the method of `size` rows, as the device's
    compiler counts them. `spilled` and `filled` are the part for values that the device's memory has no room for."""

    size: int
    read: int
    written: int
    spilled: int
    filled: int


class Port(NamedTuple):
    """One input or output of a segment."""

    name: str
    dtype: str
    shape: Shape


class Stored(NamedTuple):
    """How many weights of the linears of a role ("down"), or of tables ("table"), are kept in a format."""

    role: str
    format: str
    weights: int


@dataclass(frozen=True)
class Segment:
    """A piece of the model compiled once.

    `structure` names its computation: segments of one structure differ in their weights' numbers alone, so it is
    lowered once. `target` is the chip that its backend compiles it for, "" where that makes no difference. `recipe` is
    its quantization where scales are fixed beforehand, `snr_db` its signal-to-noise ratio against float32 in decibels.
    `contexts` counts QNN's context binaries: fewer than methods where methods of several sizes share a context, and so
    their weights. `traffic` has the bytes that the method of each size moves, where the backend's compiler counts them.
    `linear_weights` counts a language model's multiply-adds with weights for each row (0: not counted).
    `expert_weights` counts the weights of its experts, of which `chosen_weights` are read for each row.
    `attended_width`, where attention is inlined, is its multiply-adds for each row and each row of the cache: widths of
    queries and outputs of all layers. `table_bytes` are those of `weight_bytes` of which a row reads a row, no more.
    `stored` says what its weights are kept in, where `recipe` does not.
    `num_delegated` of `num_operators` operators run in the backend's delegate, the
    others in ExecuTorch's CPU kernels (both are 0 until the segment is lowered). `rows` names the proof that the rows
    of a segment that runs chunk by chunk are independent. `each_row` means that it takes one row, and that a call runs
    it for each row of a chunk in order: a recurrence, which reads the states that it writes.
    """

    name: str
    device: str
    backend: str
    shape: FixedSizes | SizeRanges
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    structure: str
    target: str = ""
    recipe: str = ""
    snr_db: float | None = None
    contexts: int = 0
    traffic: tuple[Traffic, ...] = ()
    linear_weights: int = 0
    expert_weights: int = 0
    chosen_weights: int = 0
    attended_width: int = 0
    weight_bytes: int = 0
    table_bytes: int = 0
    stored: tuple[Stored, ...] = ()
    num_operators: int = 0
    num_delegated: int = 0
    rows: str = ""
    each_row: bool = False

    def methods(self) -> dict[str, int | None]:
        """Method names in the program, each with its fixed size of "T" or None where it has none."""
        if isinstance(self.shape, FixedSizes) and self.shape.sizes:
            return {f"{self.name}@{size}": size for size in self.shape.sizes}
        return {self.name: None}


@dataclass(frozen=True)
class Value:
    """A tensor that passes between calls; it has one writer, so that dependencies follow from names.

    kind "input" comes from outside, "chunk" lives for one chunk (for one run, in a module that is not cut into
    chunks as a whole), "cache" gets the rows of every chunk (its readers see all rows up to their own chunk),
    "output" is read from outside, "state" belongs to the session and has the value that the run before left. In a
    language model one call reads a state and writes it, and every chunk goes on from what the chunk before left;
    "encoded" is what the function ENCODER gave for the whole sequence, which every chunk reads.

    `window`, of a cache, is the most rows that a token's readers see, the token's own included, so that others need not
    be kept; 0: all.
    """

    name: str
    dtype: str
    shape: Shape
    kind: Literal["input", "chunk", "cache", "output", "state", "encoded"]
    window: int = 0

    @property
    def type_text(self) -> str:
        """Dtype and shape: "float32[3, m]"."""
        return f"{self.dtype}{text(self.shape)}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one token."""
        return math.prod(size for size in self.shape if isinstance(size, int)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Call:
    """One use of a segment, or of a function: the values it reads (in port order) and writes.

    rows "last" means that generating text reads only the last row of a chunk: of lm_head's, that saves a product with
    the vocabulary for every other row.
    """

    name: str
    segment: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    rows: Literal["all", "last"] = "all"
    callee: Literal["segment", "function"] = "segment"


class State(NamedTuple):
    """A tensor of the session: the value that it has when its function begins, and the value that it takes at the
    end."""

    value: str
    next: str


@dataclass(frozen=True)
class Function:
    """Calls (in an order that can run) and values: the model, or a nested module that the policy names.

    Its symbols are its own, because it may be called at several sizes: each call gives them the sizes of its reads.
    `outputs` are values in the order of the interface, and may be inputs or the same value twice.
    """

    name: str
    calls: tuple[Call, ...]
    values: tuple[Value, ...]
    outputs: tuple[str, ...]
    ranges: tuple[Range, ...] = ()
    states: tuple[State, ...] = ()
    interface: Interface | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The values that come from outside, in the order of the interface."""
        return tuple(value for value in self.values if value.kind == "input")

    def value(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)

    @property
    def results(self) -> tuple[Value, ...]:
        """The values of `outputs`."""
        return tuple(map(self.value, self.outputs))

    def signature_text(self, name: str) -> str:
        """What it takes and gives, under a name: "name(x: float32[3, m]) -> float32[m], m in 1..8"."""
        inputs = ", ".join(f"{value.name}: {value.type_text}" for value in self.inputs)
        results = ", ".join(value.type_text for value in self.results)
        ranges = "".join(f", {symbol} in {low}..{high}" for symbol, low, high in self.ranges)
        return f"{name}({inputs}) -> {results}{ranges}"


@dataclass(frozen=True)
class Split:
    """Segments and functions; the first function is the whole model. Further functions are those that it calls; in a
    language model's program they are its encoders, which it does not call, and what they call."""

    segments: tuple[Segment, ...]
    functions: tuple[Function, ...]

    @property
    def main(self) -> Function:
        return self.functions[0]

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the whole model."""
        return self.main.calls

    @property
    def values(self) -> tuple[Value, ...]:
        """The values of the whole model."""
        return self.main.values

    @cached_property
    def decoder(self) -> Split:
        """A language model's split without its encoders: what its sessions run."""
        if len(self.functions) == 1:
            return self
        used = {call.segment for call in self.calls}
        return Split(tuple(s for s in self.segments if s.name in used), self.functions[:1])

    @property
    def weight_bytes(self) -> int:
        """Of all segments."""
        return sum(segment.weight_bytes for segment in self.segments)

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}

    @cached_property
    def _hash(self) -> int:
        return hash((self.segments, self.functions))

    def __hash__(self) -> int:  # computed once: results that depend on a split alone are cached by it
        return self._hash

    def segment(self, name: str) -> Segment:
        return self._by_name[name]

    def segments_of(self, *backends: str) -> tuple[Segment, ...]:
        return tuple(segment for segment in self.segments if segment.backend in backends)

    def function(self, name: str) -> Function:
        return next(function for function in self.functions if function.name == name)

    @property
    def states(self) -> tuple[Value, ...]:
        """The states of all functions, each once, in the order of state.bin."""
        found: dict[str, Value] = {}
        for function in self.functions:
            for state in function.states:
                found.setdefault(state.value, function.value(state.value))
        return tuple(found.values())

    def calls_of(self, segment: str) -> list[Call]:
        return [
            call
            for function in self.functions
            for call in function.calls
            if call.segment == segment and call.callee == "segment"
        ]

    @cached_property
    def appending(self) -> list[int]:
        """The places of the calls of the whole model that append to the cache or change a state, in order."""
        cached = {value.name for value in self.values if value.kind in ("cache", "state")}
        return [place for place, call in enumerate(self.calls) if cached.intersection(call.writes)]

    def writer(self) -> dict[str, int]:
        """The index of the call that writes each value of the model; its inputs have none."""
        return {name: index for index, call in enumerate(self.calls) for name in call.writes}

    def __str__(self) -> str:
        return "\n\n".join(self._text(function) for function in self.functions)

    def _text(self, function: Function) -> str:
        lines = []
        if len(self.functions) > 1:
            inputs = ", ".join(value.name for value in function.inputs)
            lines.append(f"{function.name or 'program'}({inputs}) -> {', '.join(function.outputs)}:")
        for call in function.calls:
            where = call.segment
            if call.callee == "segment":
                segment = self.segment(call.segment)
                where += f"{shape_text(segment.shape)} {segment.device}"
            tail = "" if call.rows == "all" else f" rows={call.rows}"
            lines.append(f"{', '.join(call.writes)} = {call.name}[{where}]({', '.join(call.reads)}){tail}")
        lines += [f"{state.value} becomes {state.next}" for state in function.states]
        return "\n".join(lines)


def shape_text(shape: FixedSizes | SizeRanges) -> str:
    """The sizes behind a segment's name: "@1,32", "@1..128", "@m=1..10,k=2..8", "" where all are fixed."""
    if isinstance(shape, FixedSizes):
        return "@" + ",".join(map(str, shape.sizes)) if shape.sizes else ""
    if shape.ranges and shape.ranges[0].symbol == ROWS:
        return f"@{shape.ranges[0].low}..{shape.ranges[0].high}"
    return "@" + ",".join(f"{r.symbol}={r.low}..{r.high}" for r in shape.ranges)
