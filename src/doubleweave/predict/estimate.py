"""A segment's time from a device's published figures: operations over peak, bytes over bandwidth, a cost a call.

The roofline model (Williams, Waterman, Patterson, 2009). It knows nothing of measured times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from doubleweave import _scheduling
from doubleweave.ir.split import CACHED, ITEM_BYTES, ROWS, Segment, whole_cache

_ANY_CORES = 1 << 30
WEIGHT_BYTES = {"int4": 0.5, "int8": 1.0, "float16": 2.0, "float32": 4.0}


@dataclass(frozen=True)
class Device:
    """A device's published figures.

    `launch_us` is the cost of a call. `hand_over_us` is the time from the end of a task on another worker to the start
    of a task here that reads its result. `bandwidth_gb_s` is in 1e9 bytes a second. `peak_gops[format]` is in 1e9
    operations a second of one worker (a multiply-add is two) for weights of a format; products reach the share
    `efficiency` of it. `workers` tasks run at once; None stands for any number.
    """

    launch_us: float
    hand_over_us: float
    bandwidth_gb_s: float
    peak_gops: Mapping[str, float]
    efficiency: float = 1.0
    workers: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def weight_format(recipe: str) -> str:
    """The format of a quantization recipe's weights, such as int4 of "8da4w"."""
    return "float32" if recipe == "none" else "int4" if "4w" in recipe else "int8"


class Estimate(NamedTuple):
    """A segment's microseconds on a device: a cost a call, and the longer of computing and moving bytes.

    Computing takes `row_us` a row, `square_us` a row's square, and `key_us` a row times the keys that it sees, shared
    by at most `cores` cores. Moving takes `call_bytes_us` a call, `row_bytes_us` a row and `cached_bytes_us` a cached
    token. Experts' weights take `expert_bytes_us` in all, of which a row reads the share `expert_share`. `counted_us`
    has (rows, microseconds) pairs from the traffic that the device's compiler counted; they replace all these for those
    numbers of rows. The native module works times out (EstimatedTimes in doubleweave/scheduling/costs.h).
    """

    launch_us: float
    cores: int
    row_us: float
    square_us: float
    key_us: float
    call_bytes_us: float
    row_bytes_us: float
    cached_bytes_us: float
    expert_bytes_us: float
    expert_share: float
    counted_us: tuple[tuple[float, float], ...]

    def native(self) -> _scheduling.EstimatedTimes:
        return _scheduling.EstimatedTimes(**self._asdict())


def estimate(device: Device, segment: Segment, weights: str) -> Estimate:
    """The estimate of a segment; `weights` is their format: int4, int8, float16 or float32."""

    def us(operations: float, kind: str) -> float:
        # A format without a figure runs as the slowest that has one: devices widen what they cannot compute.
        peak = device.peak_gops.get(kind) or min(device.peak_gops.values())
        return operations / (peak * device.efficiency * 1e3)

    row_us = square_us = key_us = 0.0
    weight_bytes = segment.weight_bytes - segment.table_bytes
    if any(CACHED in port.shape for port in segment.inputs):
        # Two products of a multiply-add each, queries by keys and weights by values, in the float32 of our CPU kernel.
        width = math.prod(size for size in segment.inputs[0].shape if isinstance(size, int))
        key_us = us(4.0 * width, "float32")
    elif segment.num_delegated:  # a segment that nothing was delegated of copies a table's rows
        # One multiply-add a row and weight; without a count, the weights' bytes give their number.
        row_us = us(2.0 * (segment.linear_weights or weight_bytes / WEIGHT_BYTES[weights]), weights)
        if segment.attended_width:
            # Inlined, attention goes over the whole cache and the chunk's own rows, whatever the mask hides.
            square_us = us(2.0 * segment.attended_width, "float16")
            row_us += square_us * max(map(whole_cache, segment.inputs))
    # Weights count for every call: other layers have driven them out of the caches when the next chunk comes.
    byte_us = 1 / (device.bandwidth_gb_s * 1e3)
    cached_bytes = row_bytes = call_bytes = 0
    for port in (*segment.inputs, *segment.outputs):
        fixed = math.prod(size for size in port.shape if isinstance(size, int)) * ITEM_BYTES[port.dtype]
        if CACHED in port.shape:
            cached_bytes += fixed
        elif ROWS in port.shape:
            row_bytes += fixed
        else:
            call_bytes += fixed
    expert_bytes = 0.0
    if segment.num_delegated:
        expert_bytes = min(segment.expert_weights * WEIGHT_BYTES[weights], float(weight_bytes))
        call_bytes += weight_bytes
    launch_us = device.launch_us
    if segment.each_row:  # a launch, and its weights and states, for each row
        row_us, launch_us = row_us + launch_us, 0.0
        row_bytes, call_bytes = row_bytes + call_bytes, 0
    return Estimate(
        launch_us=launch_us,
        # A CPU's peak is of one core, and a call's threads share its work; another device's is of all that a call gets.
        cores=(device.workers or _ANY_CORES) if segment.device == "cpu" else 1,
        row_us=row_us,
        square_us=square_us,
        key_us=key_us,
        call_bytes_us=(call_bytes - expert_bytes) * byte_us,
        row_bytes_us=row_bytes * byte_us,
        cached_bytes_us=cached_bytes * byte_us,
        expert_bytes_us=expert_bytes * byte_us,
        expert_share=segment.chosen_weights / max(1, segment.expert_weights),
        counted_us=tuple((float(t.size), (t.read + t.written) * byte_us) for t in segment.traffic),
    )
