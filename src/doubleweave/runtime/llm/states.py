"""The states of a sequence: fixed sizes, in two copies that swap with every token, and snapshots to go back to.

It knows nothing of prompts or schedules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from doubleweave import _native
from doubleweave.ir.split import ITEM_BYTES, Value
from doubleweave.runtime.native_errors import as_run_errors

Bytes = npt.NDArray[np.uint8]


class States:
    """Behind `length` tokens copy `length % 2` of each state is the one that counts."""

    def __init__(self, values: Sequence[Value]) -> None:
        self._names = [value.name for value in values]
        self._sizes = [value.row_bytes for value in values]
        with as_run_errors():
            self._buffers = _native.Buffers([2 * size for size in self._sizes])
        self._snapshots: dict[int, list[Bytes]] = {}
        self.reset()

    def __bool__(self) -> bool:
        return bool(self._names)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory: both copies, and the snapshots."""
        return (2 + len(self._snapshots)) * sum(self._sizes)

    @property
    def lengths(self) -> list[int]:
        """The numbers of tokens that there is a way back to."""
        return sorted({0, *self._snapshots})

    def regions(self) -> dict[str, _native.Region]:
        return {name: self._buffers.region(number) for number, name in enumerate(self._names)}

    def reset(self) -> None:
        """Zeros, as before the first token; no snapshots."""
        self._snapshots.clear()
        for number in range(len(self._names)):
            self._copy(number, 0)[:] = 0

    def take(self, length: int) -> None:
        """Keep a snapshot of the states behind `length` tokens."""
        self._snapshots[length] = [self._copy(n, length).copy() for n in range(len(self._names))]

    def drop(self, length: int) -> None:
        """Forget the snapshot of `length` tokens, if there is one."""
        self._snapshots.pop(length, None)

    def go_back(self, length: int) -> None:
        """The states behind `length` tokens, one of `lengths`; snapshots of more tokens are forgotten."""
        if length == 0:
            self.reset()
            return
        for number, kept in enumerate(self._snapshots[length]):
            self._copy(number, length)[:] = kept
        self._snapshots = {at: kept for at, kept in self._snapshots.items() if at <= length}

    def move(self, old: int, new: int) -> None:
        """Let the states behind `old` tokens stand for those behind `new`: for measuring times, not for numbers."""
        if (old - new) % 2:
            for number in range(len(self._names)):
                self._copy(number, new)[:] = self._copy(number, old)

    def fill(self, values: Mapping[str, npt.NDArray[np.float32]], length: int) -> None:
        """Put numbers into the states behind `length` tokens: arrays of the states' sizes, by name."""
        for number, name in enumerate(self._names):
            self._copy(number, length)[:] = np.ascontiguousarray(values[name]).reshape(-1).view(np.uint8)

    def _copy(self, number: int, length: int) -> Bytes:
        both = self._buffers.view(number, [2, self._sizes[number] // ITEM_BYTES["float32"]])
        copy: Bytes = both[length % 2].view(np.uint8)
        return copy
