"""The plan of a run of a module as plain data: methods and copies in order, and where every tensor lies.

It knows nothing of how a plan is made, of threads or of ExecuTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from doubleweave.ir.split import ITEM_BYTES

Place = Literal["input", "output", "state", "buffer"]


class Tensor(NamedTuple):
    """A tensor of a run, in memory of the caller (`place` "input", "output"), of the session ("state") or of the run
    ("buffer"). `number` is its number there: of the argument, the result, the state's buffer or the run's buffer.
    `writers` (several where it is written chunk by chunk) and `readers` are numbers of steps."""

    name: str
    dtype: str
    sizes: tuple[int, ...]
    place: Place = "buffer"
    number: int = -1
    writers: tuple[int, ...] = ()
    readers: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


class View(NamedTuple):
    """A tensor, or some of its rows: `offset` bytes from its beginning, `sizes` elements."""

    tensor: int
    sizes: tuple[int, ...]
    offset: int = 0


class Copy(NamedTuple):
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


class Step(NamedTuple):
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
        """The most bytes of tensors in buffers that are in use at one time; no plan takes less."""
        return most_at_once(
            (tensor.writers[0], max(tensor.readers + tensor.writers), tensor.num_bytes)
            for tensor in self.tensors
            if tensor.place == "buffer" and tensor.writers
        )


def most_at_once(spans: Iterable[tuple[int, int, int]]) -> int:
    """The most bytes in use at one time, of (begin, end, bytes); both ends are included."""
    found = list(spans)
    # The most is reached where something begins.
    return max(
        (sum(size for begin, end, size in found if begin <= at <= end) for at, _, _ in found), default=0
    )
