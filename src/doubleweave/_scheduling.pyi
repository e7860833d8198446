from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
_Choice = tuple[str, Sequence[str], int, int, int, int]
_FoundChoice = tuple[str, list[str], int, int, int, int]
_Chunk = tuple[int, int, int]
_Call = tuple[int, int, bool, bool]

SCHEDULES: list[str]

class Pattern:
    def __init__(self, body: Int32, last: Int32, body_waits: Int64, last_waits: Int64) -> None: ...

class Scratch:
    def __init__(self, blocks: Sequence[int], groups: int) -> None: ...

class Tasks:
    def __init__(
        self,
        call_of: Int32,
        chunk_of: Int32,
        after_starts: Int32,
        after: Int32,
        device: Int32,
        devices: Sequence[str],
    ) -> None: ...

class Costs:
    def __init__(
        self,
        duration_ns: Int64,
        repeated: Float64 | None,
        hand_over_ns: Int64,
        same_worker_ns: int,
        contention: Float64,
    ) -> None: ...

class MeasuredTimes:
    def __init__(
        self,
        threads: int,
        rows: Sequence[float],
        cached: Sequence[float],
        us: Sequence[Sequence[float]],
        repeated: Sequence[float],
    ) -> None: ...

class EstimatedTimes:
    def __init__(
        self,
        *,
        launch_us: float,
        cores: int,
        row_us: float,
        square_us: float,
        key_us: float,
        call_bytes_us: float,
        row_bytes_us: float,
        cached_bytes_us: float,
        counted_us: Sequence[tuple[float, float]],
    ) -> None: ...

class SegmentTimes:
    def __init__(self, measured: Sequence[MeasuredTimes], estimated: EstimatedTimes | None) -> None: ...

class CostTables:
    def __init__(
        self,
        segments: Sequence[SegmentTimes],
        hand_over_ns: Sequence[Sequence[int]],
        same_worker_ns: int,
        contention: Sequence[tuple[int, Sequence[Sequence[float]]]],
    ) -> None: ...

class Outline:
    def __init__(
        self,
        *,
        sizes: Sequence[int],
        most_rows: int,
        devices: Sequence[str],
        static_device: str,
        calls: Sequence[_Call],
        pattern: Pattern,
        scratch: Scratch,
        max_tokens: int,
    ) -> None: ...

class Machine:
    def __init__(
        self,
        *,
        costs: CostTables,
        most_tasks: Sequence[int],
        overlapping: str,
        threads: int,
        decisions: Sequence[tuple[int, _Choice]],
    ) -> None: ...

class Planner:
    def __init__(self, outline: Outline, machine: Machine) -> None: ...
    def default_threads(self, cores: int, most: int) -> int: ...
    def check(
        self, schedule: str, threads: int, workers: Sequence[str] | None, chunk: int | None
    ) -> None: ...
    def choose(
        self, num_tokens: int, schedule: str, threads: int, workers: Sequence[str] | None, chunk: int | None
    ) -> _FoundChoice: ...
    def settled(self, choice: _Choice, threads: int, num_tokens: int) -> _FoundChoice: ...
    def candidates(self, num_tokens: int, threads: int) -> list[_FoundChoice]: ...
    def best(self, num_tokens: int, threads: int) -> _FoundChoice: ...

def cut(num_tokens: int, fixed: Sequence[int], most: int, num_workers: int, limit: int) -> list[_Chunk]: ...
def default_choice(
    schedule: str,
    workers: Sequence[str] | None,
    chunk: int | None,
    threads: int,
    devices: Sequence[str],
    most_rows: int,
) -> _FoundChoice: ...
def num_abreast(choice: _Choice, static_device: str, chunks: int) -> int: ...
def repeat(
    pattern: Pattern, scratch: Scratch, chunks: Sequence[_Chunk], in_flight: int, abreast: int
) -> tuple[Int32, Int32, Int32, Int32, int]: ...
def make_schedule(
    name: str, tasks: Tasks, workers: Sequence[str], costs: Costs
) -> tuple[list[str], list[list[int]]]: ...
def times(
    workers: Sequence[str], lists: Sequence[Sequence[int]], tasks: Tasks, costs: Costs
) -> tuple[Int64, Int64]: ...
def without_barriers(
    lists: Sequence[Sequence[int]], after_starts: Int32, after: Int32
) -> tuple[list[list[int]], Int32, Int32]: ...
def path_to_end(duration_ns: Int64, after_starts: Int32, after: Int32) -> Int64: ...
def time_us(times: SegmentTimes, rows: Float64, cached: Float64, threads: int) -> Float64: ...
def costs_of(
    tables: CostTables,
    calls: Sequence[_Call],
    chunks: Sequence[_Chunk],
    call_of: Int32,
    chunk_of: Int32,
    threads: int,
    num_workers: int,
    all_rows: bool,
    cached: int,
) -> tuple[Int64, Float64, Int64, int, Float64]: ...
def lengths_up_to(most: int) -> list[int]: ...
