"""One compiled method as a callable over NumPy arrays.

It knows nothing of splits or sessions: just ports, sizes and a loaded instance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from doubleweave import _native
from doubleweave.errors import InputError, RunError
from doubleweave.instances import Instances
from doubleweave.ir import Dynamic, Port, Segment, Shape

Array = npt.NDArray[Any]


class Method:
    """Call it with one array an input; it returns an array (or a tuple), which the caller owns.

    `out=` gives the arrays to write into. The GIL is released while it runs; a call that comes while
    another runs in the same method is refused with RunError.
    """

    def __init__(self, name: str, segment: Segment, size: int | None, instances: Instances) -> None:
        self.name = name
        self.segment = segment
        self.size = size
        self._instances = instances

    def __repr__(self) -> str:
        inputs = ", ".join(
            f"{port.name}: {port.dtype}{_text(port.shape, self.size)}" for port in self.segment.inputs
        )
        outputs = ", ".join(f"{port.dtype}{_text(port.shape, self.size)}" for port in self.segment.outputs)
        shape = self.segment.shape
        rows = f", T in {shape.low}..{shape.high}" if isinstance(shape, Dynamic) else ""
        return f"<method {self.name}({inputs}) -> {outputs}{rows}>"

    def __call__(self, *args: Array, out: Array | Sequence[Array] | None = None) -> Array | tuple[Array, ...]:
        """Run it. Raises InputError for a wrong count, dtype or shape, naming the allowed ones."""
        if len(args) != len(self.segment.inputs):
            raise InputError(
                f"{self.name}: found {len(args)} inputs, expected {len(self.segment.inputs)}: {self!r}"
            )
        arrays = [np.asarray(arg) for arg in args]
        sizes: dict[str, int] = {} if self.size is None else {"T": self.size}
        for port, array in zip(self.segment.inputs, arrays, strict=True):
            self._check(port, array, sizes)
        arrays = [np.ascontiguousarray(array) for array in arrays]
        outputs = self._outputs(out, sizes)
        try:
            self._instances.get(self.name).run(arrays, outputs)
        except _native.Error as error:
            raise RunError(str(error)) from error
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _check(self, port: Port, array: Array, sizes: dict[str, int]) -> None:
        where = f"{self.name}, input {port.name}"
        if array.dtype != port.dtype:
            raise InputError(f"{where}: found dtype {array.dtype}, expected {port.dtype}")
        expected = _text(port.shape, self.size)
        if array.ndim != len(port.shape):
            raise InputError(f"{where}: found shape {list(array.shape)}, expected {expected}")
        for size, found in zip(port.shape, array.shape, strict=True):
            wanted = sizes.setdefault(size, found) if isinstance(size, str) else size
            if found != wanted:
                raise InputError(
                    f"{where}: found shape {list(array.shape)}, expected {expected}"
                    + (f" with {size} = {wanted} as in the inputs before" if isinstance(size, str) else "")
                )
        shape = self.segment.shape
        if not isinstance(shape, Dynamic):
            return
        for symbol, low, high in (("T", shape.low, shape.high), ("S", sizes.get("T", 1), shape.max_cached)):
            if symbol in port.shape and not low <= sizes[symbol] <= high:
                raise InputError(f"{where}: found {symbol} = {sizes[symbol]}, expected {low} to {high}")

    def _outputs(self, out: Array | Sequence[Array] | None, sizes: dict[str, int]) -> list[Array]:
        shapes = [
            tuple(sizes[size] if isinstance(size, str) else size for size in port.shape)
            for port in self.segment.outputs
        ]
        ports = self.segment.outputs
        if out is None:
            return [np.empty(shape, dtype=port.dtype) for shape, port in zip(shapes, ports, strict=True)]
        given = [out] if isinstance(out, np.ndarray) else list(out)
        if len(given) != len(shapes):
            raise InputError(f"{self.name}, out: found {len(given)} arrays, expected {len(shapes)}")
        result = []
        for array, shape, port in zip(given, shapes, ports, strict=True):
            # One that is not contiguous would be written to a copy.
            usable = array.flags.c_contiguous and array.flags.writeable
            if array.dtype != port.dtype or array.size < math.prod(shape) or not usable:
                raise InputError(
                    f"{self.name}, out: found {array.dtype}{list(array.shape)}, expected contiguous, writable "
                    f"{port.dtype} with room for {list(shape)}"
                )
            result.append(array.reshape(-1)[: math.prod(shape)].reshape(shape))
        return result


def _text(shape: Shape, size: int | None) -> str:
    return "[" + ", ".join(str(size) if s == "T" and size is not None else str(s) for s in shape) + "]"
