"""Tensors of a model's files by name, whatever the format: what modules are loaded from, and read from later.

Knows nothing of modules.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

_NUMBERS = 1 << 17  # that are computed at a time: they stay in the processor's cache


class Rows:
    """A tensor of `shape` [N, …] that is computed from a file: `compute` gives the rows at a slice or at indices.

    What comes out is float32.
    """

    def __init__(self, shape: tuple[int, ...], compute: Callable[[slice | Tensor], Tensor]) -> None:
        self.shape, self._compute = shape, compute

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        return self._compute(rows)

    def whole(self) -> Tensor:
        """All of it, in memory of its own."""
        made = torch.empty(self.shape)
        step = max(1, _NUMBERS // max(1, made[:1].numel()))
        for start in range(0, len(made), step):
            made[start : start + step] = self[start : start + step]
        return made


# A tensor as its file has it: mapped, in whatever dtype, or computed from what is mapped.
Saved = Tensor | Rows


class SavedTensors(Mapping[str, Tensor]):
    """The tensors by name; `tensors[name]` is read into memory, or mapped for as long as the files are open."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    @abstractmethod
    def dtype(self, name: str) -> str:
        """The dtype that its numbers are saved in, as safetensors, torch or GGUF writes it."""

    @abstractmethod
    def opened(self, names: Sequence[str]) -> AbstractContextManager[list[Saved]]:
        """Tensors as the files have them, which no memory is held for behind the context."""


class RenamedTensors(SavedTensors):
    """Tensors of `files` under other names: `saved` has the name in the files by the new one."""

    def __init__(self, files: SavedTensors, saved: Mapping[str, str]) -> None:
        self._files, self._saved = files, saved

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._saved[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._files.shape(self._saved[name])

    def dtype(self, name: str) -> str:
        return self._files.dtype(self._saved[name])

    def opened(self, names: Sequence[str]) -> AbstractContextManager[list[Saved]]:
        return self._files.opened([self._saved[name] for name in names])


def in_float32(saved: Saved) -> Tensor:
    """All of it, in memory of its own."""
    return saved.whole() if isinstance(saved, Rows) else saved.to(torch.float32, copy=True)
