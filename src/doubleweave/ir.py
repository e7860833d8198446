"""The split: segments, calls and values, the whole model as a small frozen graph.

Plain data that prints, parses (`Split.from_dict(split.to_dict())`) and diffs. It knows nothing of torch or
ExecuTorch: it is what the compiler hands to the run time.

Sizes in shapes are numbers or symbols: "T" (rows of the chunk at hand) and "S" (rows of the cache up to
and including that chunk).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Size = int | str
Shape = tuple[Size, ...]

ITEM_BYTES = {"float32": 4, "int64": 8, "int32": 4, "bool": 1}


@dataclass(frozen=True)
class Static:
    """Fixed sizes, as an NPU compiles them: one method a size, a chunk is padded up to one of them."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Dynamic:
    """One method for every "T" from `low` to `high`, and every "S" up to `max_cached` where there is one."""

    low: int
    high: int
    max_cached: int = 0


@dataclass(frozen=True)
class Port:
    """One input or output of a segment."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Segment:
    """A piece of the model compiled once.

    `structure` names what it computes without its weights: equal structures differ in weights alone.
    `num_delegated` of `num_operators` operators run in the backend's delegate, the others in ExecuTorch's
    CPU kernels (both are 0 until the segment is lowered).
    """

    name: str
    device: str
    backend: str
    shape: Static | Dynamic
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    structure: str
    weight_bytes: int = 0
    num_operators: int = 0
    num_delegated: int = 0

    def methods(self) -> dict[str, int | None]:
        """Method names in the program, each with its fixed size or None for a dynamic one."""
        if isinstance(self.shape, Static):
            return {f"{self.name}@{size}": size for size in self.shape.sizes}
        return {self.name: None}


@dataclass(frozen=True)
class Value:
    """A tensor that passes between calls; one writer.

    kind "input" comes from outside, "chunk" lives for one chunk, "cache" gets the rows of every chunk
    (its readers see all rows up to their own chunk), "output" is read from outside.
    """

    name: str
    dtype: str
    shape: Shape
    kind: Literal["input", "chunk", "cache", "output"]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one token."""
        return math.prod(size for size in self.shape if isinstance(size, int)) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Call:
    """One use of a segment: the values it reads (in port order) and writes.

    rows "last" means that only the last row of a chunk is of interest when text is generated.
    """

    name: str
    segment: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    rows: Literal["all", "last"] = "all"


@dataclass(frozen=True)
class Split:
    """Segments + calls (in an order that can run) + values."""

    segments: tuple[Segment, ...]
    calls: tuple[Call, ...]
    values: tuple[Value, ...]

    def segment(self, name: str) -> Segment:
        return next(segment for segment in self.segments if segment.name == name)

    def value(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)

    def calls_of(self, segment: str) -> Iterator[Call]:
        return (call for call in self.calls if call.segment == segment)

    def writer(self) -> dict[str, int]:
        """The index of the call that writes each value; inputs of the model have none."""
        return {name: index for index, call in enumerate(self.calls) for name in call.writes}

    def __str__(self) -> str:
        lines = []
        for call in self.calls:
            segment = self.segment(call.segment)
            shape = segment.shape
            sizes = (
                "@" + ",".join(map(str, shape.sizes))
                if isinstance(shape, Static)
                else f"@{shape.low}..{shape.high}"
            )
            rows = "" if call.rows == "all" else f" rows={call.rows}"
            lines.append(
                f"{', '.join(call.writes)} = {call.name}[{call.segment}{sizes} {segment.device}]"
                f"({', '.join(call.reads)}){rows}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "segments": [_segment_to_dict(segment) for segment in self.segments],
            "calls": [
                {
                    "name": c.name,
                    "segment": c.segment,
                    "reads": list(c.reads),
                    "writes": list(c.writes),
                    "rows": c.rows,
                }
                for c in self.calls
            ],
            "values": [
                {"name": v.name, "dtype": v.dtype, "shape": list(v.shape), "kind": v.kind}
                for v in self.values
            ],
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Split:
        """Parse what `to_dict` made; KeyError, TypeError or ValueError on anything else."""
        return Split(
            segments=tuple(_segment_from_dict(item) for item in data["segments"]),
            calls=tuple(
                Call(**{**item, "reads": tuple(item["reads"]), "writes": tuple(item["writes"])})
                for item in data["calls"]
            ),
            values=tuple(Value(**{**item, "shape": tuple(item["shape"])}) for item in data["values"]),
        )


def _segment_to_dict(segment: Segment) -> dict[str, Any]:
    shape = segment.shape
    return {
        "name": segment.name,
        "device": segment.device,
        "backend": segment.backend,
        "shape": {"static": list(shape.sizes)}
        if isinstance(shape, Static)
        else {"dynamic": [shape.low, shape.high, shape.max_cached]},
        "inputs": [_port_to_list(port) for port in segment.inputs],
        "outputs": [_port_to_list(port) for port in segment.outputs],
        "structure": segment.structure,
        "weight_bytes": segment.weight_bytes,
        "num_operators": segment.num_operators,
        "num_delegated": segment.num_delegated,
    }


def _segment_from_dict(data: dict[str, Any]) -> Segment:
    shape = data["shape"]
    return Segment(
        **{
            **data,
            "shape": Static(tuple(shape["static"])) if "static" in shape else Dynamic(*shape["dynamic"]),
            "inputs": tuple(_port_from_list(item) for item in data["inputs"]),
            "outputs": tuple(_port_from_list(item) for item in data["outputs"]),
        }
    )


def _port_to_list(port: Port) -> list[Any]:
    return [port.name, port.dtype, list(port.shape)]


def _port_from_list(data: list[Any]) -> Port:
    name, dtype, shape = data
    return Port(name, dtype, tuple(shape))
