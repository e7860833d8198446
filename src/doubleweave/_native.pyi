"""Types of the compiled module; native/python/ implements it and native/include/ documents it."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class _DLPack(Protocol):
    """PyTorch tensors, JAX arrays."""

    def __dlpack__(self) -> Any: ...

# NumPy declares its arrays to be buffers only from Python 3.12 on.
_Array: TypeAlias = NDArray[Any] | Buffer | _DLPack

class Error(RuntimeError):
    """A wrong argument, a damaged program, or a method that failed."""

class TensorInfo:
    """What a method expects of an input or gives as an output."""

    dtype: Final[str]
    sizes: Final[tuple[int, ...]]  # upper bounds where `is_dynamic`
    is_dynamic: Final[bool]
    nbytes: Final[int]  # at the upper bound

class Instance:
    """A loaded method with its own memory; one thread at a time uses it."""

    method: Final[str]
    inputs: Final[list[TensorInfo]]
    outputs: Final[list[TensorInfo]]
    def bind_input(self, index: int, address: int, sizes: Sequence[int]) -> None:
        """Read an input from an address; the caller keeps the memory alive."""

    def bind_output(self, index: int, address: int, capacity_bytes: int, sizes: Sequence[int] = ...) -> None:
        """Write an output to an address; without sizes the capacity must hold the upper bound."""

    def execute(self) -> None:
        """Run what is bound, without the GIL."""

    def output_sizes(self, index: int) -> tuple[int, ...]: ...
    def run(
        self, inputs: Sequence[_Array], outputs: Sequence[_Array], threads: int = 0
    ) -> list[tuple[int, ...]]:
        """Run on C-contiguous arrays without a copy; output shapes must be exact. Returns their sizes.

        `threads` sets the number of intra-operator threads; 0 keeps what is set."""

class Program:
    """An ExecuTorch program file, mapped into memory."""

    def __init__(self, path: str) -> None: ...
    path: Final[str]
    method_names: Final[list[str]]
    def trim(self) -> None:
        """Let go of the file's pages; used ones come back on demand."""
    def load(self, method: str, workspace_group: int = -1) -> Instance:
        """Load a method, without the GIL. Instances of one workspace group (not -1) share scratch memory."""

class Region:
    """Memory that tasks read and write; keeps its owner alive."""

    @staticmethod
    def of(array: _Array, writable: bool = True) -> Region:
        """The memory of a C-contiguous array; one not `writable` may be read-only, and no task may write it."""

    address: Final[int]
    nbytes: Final[int]
    writable: Final[bool]

class KvCache:
    """Rows that grow with the tokens; memory is committed as it is written."""

    def __init__(self, row_bytes: Sequence[int], max_tokens: int, slack_tokens: int = 0) -> None: ...
    num_entries: Final[int]
    max_tokens: Final[int]
    @property
    def length(self) -> int: ...
    @property
    def committed_bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    def row_bytes(self, entry: int) -> int: ...
    def note_length(self, num_tokens: int, num_padding: int = 0) -> None: ...
    def truncate(self, num_tokens: int) -> None: ...
    def region(self, entry: int) -> Region: ...
    def view(self, entry: int, num_rows: int, dtype: str = "float32") -> NDArray[Any]:
        """A NumPy view [num_rows, row_bytes / itemsize]; reading commits no memory, writing does."""

class Buffers:
    """Buffers that the runtime owns, aligned to 64 bytes, zeroed."""

    def __init__(self, sizes_bytes: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...
    total_bytes: Final[int]
    def bytes(self, id: int) -> int: ...
    def address(self, id: int) -> int: ...
    def region(self, id: int) -> Region: ...
    def view(self, id: int, shape: Sequence[int], dtype: str = "float32") -> NDArray[Any]:
        """A NumPy view of the buffer's beginning."""

class Binding:
    """Where an input or output of a task lies, with `base` the tokens in the cache when a run starts:
    offset + offset_per_token * base bytes into the buffer; sizes[grow_dim] grows by base."""

    def __init__(
        self,
        buffer: int,
        sizes: Sequence[int] = ...,
        offset: int = 0,
        offset_per_token: int = 0,
        grow_dim: int = -1,
    ) -> None: ...
    buffer: Final[int]
    sizes: Final[list[int]]
    offset: Final[int]
    offset_per_token: Final[int]
    grow_dim: Final[int]

class Copy:
    """Blocks copied from one region to another: block i from source_offset + i * source_stride to
    target_offset + i * target_stride, with `pad_bytes` zeros behind it. All in bytes; no base moves it."""

    def __init__(
        self,
        *,
        source: int,
        target: int,
        block_bytes: int,
        num_blocks: int = 1,
        source_offset: int = 0,
        source_stride: int = 0,
        target_offset: int = 0,
        target_stride: int = 0,
        pad_bytes: int = 0,
    ) -> None: ...
    source: Final[int]
    source_offset: Final[int]
    source_stride: Final[int]
    target: Final[int]
    target_offset: Final[int]
    target_stride: Final[int]
    num_blocks: Final[int]
    block_bytes: Final[int]
    pad_bytes: Final[int]

class Task:
    """One execution of an instance, or one copy, after the tasks in `after`."""

    def __init__(
        self,
        instance: int,
        inputs: Sequence[Binding],
        outputs: Sequence[Binding],
        after: Sequence[int] = ...,
        label: int = 0,
    ) -> None: ...
    @staticmethod
    def of_copy(copy: Copy, after: Sequence[int] = ..., label: int = 0) -> Task:
        """A task that runs no method; its `instance` is -1."""

    copy: Final[Copy | None]
    instance: Final[int]
    inputs: Final[list[Binding]]
    outputs: Final[list[Binding]]
    after: Final[list[int]]
    label: Final[int]

class Execution:
    """A prepared run: tasks, in an order for each worker; worker 0 is the calling thread."""

    def __init__(
        self,
        instances: Sequence[Instance],
        regions: Sequence[Region],
        tasks: Sequence[Task],
        workers: Sequence[Sequence[int]],
        threads_per_worker: int = 1,
    ) -> None: ...
    max_base: Final[int]
    num_tasks: Final[int]
    num_workers: Final[int]
    def num_finished(self) -> list[int]: ...
    def run(
        self, base: int = 0, record: bool = False, rebound: Mapping[int, Region] = ...
    ) -> NDArray[np.int64] | None:
        """Run every task once, without the GIL; Ctrl-C stops it with KeyboardInterrupt.

        With `record`, returns int64 [n, 4]: (task, worker, start ns, end ns), worker by worker. The regions
        `rebound` lie elsewhere for this run, each with at least the bytes of the one that it replaces."""

class Turn:
    """Names in use until it ends, at the latest when nothing refers to it."""

    def __enter__(self) -> Turn: ...
    def __exit__(self, type: object, value: object, traceback: object) -> None: ...

class Turns:
    """Names that are used by one at a time, in the order asked for."""

    def take(self, names: Sequence[str]) -> Turn:
        """Wait, without the GIL, until nobody who came before uses any of the names; what a signal's handler
        raises ends the wait."""

def say_crashes(exit_code: int) -> None:
    """From now on a crash writes one sentence to standard error and ends the process with this code."""

def max_threads() -> int: ...
def pool_threads() -> int: ...
def set_pool_threads(num_threads: int) -> None: ...
def intra_op_threads() -> int: ...
def set_intra_op_threads(num_threads: int) -> None:
    """Wait until nothing runs, then let operators use this many threads."""

def attention(
    q: _Array,
    k: _Array,
    v: _Array,
    out: _Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    causal: bool = True,
    num_threads: int = 1,
) -> None:
    """Attention of q [T, H*D] over k [S, K*D] and v [S, K*Dv], float32, into out [T, H*Dv]."""

def rotary(x: _Array, cos: _Array, sin: _Array, out: _Array, *, num_heads: int) -> None:
    """Rotary embedding of x [T, H*D] by cos and sin [T, R], float32, into out [T, H*D]."""

def attention_isa() -> str: ...
def set_attention_isa(name: str) -> bool:
    """Choose the instruction set of attention; False if this machine or build lacks it."""
