"""The states of a session: tensors that a module's `forward` changes, by name, as they are between runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doubleweave import _native
from doubleweave.errors import InputError, ProgramError
from doubleweave.ir.split import ITEM_BYTES, Split
from doubleweave.runtime.module.arrays import dtype_name, readable
from doubleweave.runtime.native_errors import as_run_errors


class States(MutableMapping[str, npt.NDArray[Any]]):
    """Read one with `states["name"]` (a NumPy copy), write it with `states["name"] = array`.

    Each state has two buffers that swap when it is updated, because a run still reads the old value while it writes
    the new one. bfloat16 is given as uint16, its bits.
    """

    def __init__(self, split: Split, path: Path) -> None:
        self._values = {value.name: value for value in split.states}
        sizes = [math.prod(map(int, v.shape)) * ITEM_BYTES[v.dtype] for v in split.states]
        self._number = {name: 2 * index for index, name in enumerate(self._values)}
        self._current = dict.fromkeys(self._values, 0)
        with as_run_errors():
            self._buffers = _native.Buffers([size for size in sizes for _ in range(2)])
        data = path.read_bytes() if self._values else b""
        if len(data) != sum(sizes):
            raise ProgramError(
                f"{path}: found {len(data)} bytes, expected {sum(sizes)}; compile the program again"
            )
        ends = accumulate(sizes)
        self._first = {
            name: data[end - n : end] for name, n, end in zip(self._values, sizes, ends, strict=True)
        }
        self.reset()

    def region(self, name: str, ahead: int) -> _native.Region:
        """The memory a state is in now (0) or will be in after its next update (1)."""
        return self._buffers.region(self._number[name] + (self._current[name] + ahead) % 2)

    def updated(self, name: str, times: int) -> None:
        self._current[name] = (self._current[name] + times) % 2

    def reset(self, name: str | None = None) -> None:
        """Give one state, or all, the value it had in the module. Raises InputError for an unknown name."""
        for each in self._values if name is None else (self._known(name),):
            view = self._view(each)
            view[...] = np.frombuffer(self._first[each], dtype=view.dtype).reshape(view.shape)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._view(self._known(name)).copy()

    def __setitem__(self, name: str, value: Any) -> None:
        view = self._view(self._known(name))
        wanted = self._values[name]
        array = value
        if isinstance(value, (bool, int, float, list, tuple)) and wanted.dtype != "bfloat16":
            array = np.asarray(value, dtype=wanted.dtype)
        shape, dtypes = list(view.shape), (wanted.dtype, view.dtype.name)
        if list(getattr(array, "shape", ())) != shape or dtype_name(array) not in dtypes:
            found = (
                f"{dtype_name(array)}{list(array.shape)}"
                if hasattr(array, "shape")
                else f"a {type(array).__name__}"
            )
            raise InputError(f"state {name!r}: found {found}, expected {wanted.dtype}{shape}")
        view[...] = np.asarray(readable(array, f"state {name!r}"))

    def __delitem__(self, name: str) -> None:
        raise InputError(f"state {name!r}: cannot be deleted; reset() gives it its first value")

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._values else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        rows = (f"{v.name}: {v.dtype}{list(v.shape)}" for v in self._values.values())
        return f"<states {', '.join(rows)}>"

    def _known(self, name: str) -> str:
        if name not in self._values:
            names = ", ".join(self._values) or "(none)"
            raise InputError(f"state {name!r}: there is no such state; this program has {names}")
        return name

    def _view(self, name: str) -> npt.NDArray[Any]:
        value = self._values[name]
        dtype = "uint16" if value.dtype == "bfloat16" else value.dtype
        shape = [int(size) for size in value.shape]
        return self._buffers.view(self._number[name] + self._current[name], shape, dtype)
