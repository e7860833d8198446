"""Large weights that nobody reads while a piece is lowered: ExecuTorch gets a name where it would copy their bytes.

It copies and hashes the bytes of a constant several times, all of which is thrown away: a template says only which
weight goes where. Memory that is never touched stands in for the weight, and takes none. Knows no backend.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20
# Numbers at the beginning that are made up, so that a copy in another form is told from zeros.
_TOUCHED = 1024


class _Name(bytes):
    """Which weight it is; its length is that of the weight's bytes."""

    size: int

    def __new__(cls, index: int, size: int) -> _Name:
        made = super().__new__(cls, f"weight {index}".encode())
        made.size = size
        return made

    def __len__(self) -> int:
        return self.size

    def __deepcopy__(self, memo: Any) -> _Name:
        return self


class UnreadWeights:
    """The weights of a segment, by number, that memory stands in for."""

    def __init__(self) -> None:
        self._names: dict[int, _Name] = {}  # by address
        self._numbers: dict[int, int] = {}
        self._memory: list[Tensor] = []  # while it is there, its address is no other tensor's

    def stand_in(self, index: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for weight `index`, with a few numbers at its beginning: in -8 … 7, or positive."""
        made = torch.empty(shape, dtype=dtype)
        start = made.view(-1)[:_TOUCHED]
        generator = torch.Generator().manual_seed(index)
        if dtype == torch.int8:
            start.copy_(torch.randint(-8, 8, start.shape, generator=generator))
        else:
            start.copy_(torch.rand(start.shape, generator=generator) + 0.5)
        self._memory.append(made)
        self._names[made.data_ptr()] = _Name(index, made.nbytes)
        self._numbers[made.data_ptr()] = index
        return made

    def digests(self) -> dict[bytes, int]:
        """The SHA-256 of each name, with the weight that it stands for."""
        return {
            hashlib.sha256(name).digest(): self._numbers[address] for address, name in self._names.items()
        }

    def __contains__(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, torch.nn.Parameter):  # a fake one has no address
            return False
        return self._name_of(tensor.data_ptr(), tensor.untyped_storage().nbytes()) is not None

    def __bool__(self) -> bool:
        return bool(self._names)

    @contextmanager
    def emitted(self) -> Iterator[None]:
        """Meanwhile ExecuTorch's emitter takes names for bytes, and copies of a program share the memory."""
        if not self:
            yield
            return
        from executorch.exir.emit import _emitter

        copy: Callable[[Tensor, Any], Tensor] = Tensor.__deepcopy__

        def copied(tensor: Tensor, memo: Any) -> Tensor:
            return tensor if tensor in self else copy(tensor, memo)

        setattr(Tensor, "__deepcopy__", copied)  # noqa: B010  mypy takes no assignment to a method
        try:
            with self.named_in(_emitter):
                yield
        finally:
            setattr(Tensor, "__deepcopy__", copy)  # noqa: B010

    @contextmanager
    def named_in(self, module: Any) -> Iterator[None]:
        """Meanwhile a Python module that calls bytes() on what it finds at a tensor's address gets names."""

        def as_bytes(data: Any = b"", *args: Any) -> bytes:
            if isinstance(data, ctypes.Array):
                name = self._name_of(ctypes.addressof(data), ctypes.sizeof(data))
                if name is not None:
                    return name
            return bytes(data, *args)

        module.bytes = as_bytes  # a module's own name comes before Python's
        try:
            yield
        finally:
            del module.bytes

    def _name_of(self, address: int, size: int) -> _Name | None:
        name = self._names.get(address)
        return name if name is not None and name.size == size else None
