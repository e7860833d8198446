"""A segment's time from a device's published figures: operations over peak, bytes over bandwidth, a cost a call.

The roofline model (Williams, Waterman, Patterson, 2009). It knows nothing of measured times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from doubleweave.errors import InputError
from doubleweave.ir.split import CACHED, ITEM_BYTES, ROWS, Port, Segment, whole_cache

FloatArray = npt.NDArray[np.float64]
_ITEM_BYTES = {"int4": 0.5, "int8": 1.0, "float16": 2.0, "float32": 4.0}


@dataclass(frozen=True)
class Device:
    """What one device can do. `workers` tasks run on it at once (None: as many as one likes); `peak_gops[format]` are
    1e9 operations a second of one worker for weights of a format (a multiply-add is two), of which products reach the
    share `efficiency`;
    `bandwidth_gb_s` in 1e9 bytes a second; `launch_us` is the cost of a call; `hand_over_us` from the end of a task on
    another worker to the start of one here that reads its result."""

    launch_us: float
    hand_over_us: float
    bandwidth_gb_s: float
    peak_gops: Mapping[str, float]
    efficiency: float = 1.0
    workers: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @staticmethod
    def parse(data: Any, where: str) -> Device:
        """Parse a table of a profile; raises InputError that names the key."""
        if not isinstance(data, Mapping):
            raise InputError(f"{where}: found {data!r}, expected a table")
        names = set(Device.__annotations__)
        if unknown := sorted(set(data) - names):
            raise InputError(f"{where}: found key {unknown[0]!r}, expected one of {', '.join(sorted(names))}")
        if missing := sorted(names - set(data) - {"efficiency", "workers"}):
            raise InputError(f"{where}: key {missing[0]!r} is missing")
        peak = data["peak_gops"]
        if not isinstance(peak, Mapping) or not peak or not set(peak) <= set(_ITEM_BYTES):
            raise InputError(
                f"{where}, peak_gops: found {peak!r}, expected numbers for some of {', '.join(_ITEM_BYTES)}"
            )
        numbers = [(key, data[key]) for key in names - {"peak_gops"} if key in data]
        for key, value in [*numbers, *((f"peak_gops.{k}", v) for k, v in peak.items())]:
            least = 0 if key in ("launch_us", "hand_over_us") else 1e-9
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e18:
                raise InputError(f"{where}, {key}: found {value!r}, expected a number above 0")
        if not isinstance(data.get("workers", 1), int):
            raise InputError(f"{where}, workers: found {data['workers']!r}, expected a whole number above 0")
        return Device(**data)


def weight_format(recipe: str) -> str:
    """The format of a quantization recipe's weights, such as int4 of "8da4w"."""
    return "float32" if recipe == "none" else "int4" if recipe.endswith("4w") else "int8"


def estimate_us(
    device: Device, segment: Segment, weights: str, rows: FloatArray, cached: FloatArray, threads: int
) -> FloatArray:
    """Microseconds of one call for `rows` rows, the cache, where the segment reads one, holding `cached`.

    `weights` is their format: int4, int8, float16 or float32. On a CPU `threads` cores share the work, of those
    it has.
    """
    cores = min(threads, device.workers or threads) if segment.device == "cpu" else 1
    compute_us = np.zeros(len(rows))
    for kind, operations in _operations(segment, weights, rows, cached):
        peak = device.peak_gops.get(kind) or min(device.peak_gops.values())
        compute_us += operations / (peak * device.efficiency * cores * 1e3)
    memory_us = _moved(segment, rows, cached) / (device.bandwidth_gb_s * 1e3)
    result: FloatArray = device.launch_us + np.maximum(compute_us, memory_us)
    return result


def _operations(
    segment: Segment, weights: str, rows: FloatArray, cached: FloatArray
) -> list[tuple[str, FloatArray]]:
    """Operations of one call, by the format that they are in."""
    if any(CACHED in port.shape for port in segment.inputs):
        # Queries times keys and weights times values; a chunk's rows see half of each other.
        width = math.prod(size for size in segment.inputs[0].shape if isinstance(size, int))
        return [("float32", 4.0 * width * rows * np.maximum(cached - rows / 2, 1))]
    if segment.num_delegated == 0:
        return []  # a table's rows are copied
    products = segment.linear_weights or segment.weight_bytes / _ITEM_BYTES[weights]
    found = [(weights, 2.0 * rows * products)]
    if segment.attended_width:
        # Inlined, attention goes over the whole cache and the chunk's own rows, whatever the mask hides.
        whole = max(map(whole_cache, segment.inputs))
        found.append(("float16", 2.0 * segment.attended_width * rows * (whole + rows)))
    return found


def _moved(segment: Segment, rows: FloatArray, cached: FloatArray) -> FloatArray:
    """Bytes of one call to and from memory: what the device's compiler counted, else weights, inputs and outputs."""
    ports = (*segment.inputs, *segment.outputs)
    moved = sum((_bytes(port, rows, cached) for port in ports), np.zeros(len(rows)))
    if segment.num_delegated:
        moved = moved + segment.weight_bytes
    for traffic in segment.traffic:
        moved = np.where(rows == traffic.size, float(traffic.read + traffic.written), moved)
    return moved


def _bytes(port: Port, rows: FloatArray, cached: FloatArray) -> FloatArray:
    fixed = math.prod(size for size in port.shape if isinstance(size, int)) * ITEM_BYTES[port.dtype]
    if CACHED in port.shape:
        return fixed * cached
    return fixed * rows if ROWS in port.shape else np.full(len(rows), float(fixed))
