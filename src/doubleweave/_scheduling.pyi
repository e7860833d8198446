from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

def simulate(
    duration_ns: Int64,
    after_starts: Int32,
    after: Int32,
    workers: Sequence[Sequence[int]],
    hand_over_ns: Int64,
    kind: Int32,
    contention: Float64,
) -> tuple[Int64, Int64]: ...
def list_schedule(
    duration_ns: Int64,
    after_starts: Int32,
    after: Int32,
    device: Int32,
    worker_device: Int32,
    priority: Int64,
    home: Int32,
    hand_over_ns: Int64,
) -> list[list[int]]: ...
def path_to_end(duration_ns: Int64, after_starts: Int32, after: Int32) -> Int64: ...
