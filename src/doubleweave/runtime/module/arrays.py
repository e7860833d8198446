"""Tensors as the caller has them: NumPy arrays, torch tensors, JAX arrays, anything with DLPack on the CPU.

Results come in the kind of the first tensor given. Nothing is imported here that the caller has not imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from doubleweave import _native
from doubleweave.errors import InputError

Kind = Literal["numpy", "torch", "jax"]


def kind_of(values: Sequence[Any]) -> Kind:
    """The kind of the first tensor; NumPy where there is none or it is of another library."""
    modules = {base.__module__.partition(".")[0] for base in type(values[0]).__mro__} if values else set()
    if "torch" in modules:
        return "torch"
    return "jax" if modules & {"jax", "jaxlib"} else "numpy"


def dtype_name(value: Any) -> str:
    """ "float32" and so on."""
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype) and not dtype.isnative:
        return str(dtype)  # such as ">f4"
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def readable(value: Any, where: str) -> Any:
    """The tensor itself if it can be read where it is, else a contiguous copy.

    Raises InputError for a tensor that is not on the CPU.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value).reshape(np.shape(value))
        # NumPy has no bfloat16 of its own.
        return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    if kind_of([value]) == "torch":
        if getattr(value, "is_nested", False):
            raise InputError(f"{where}: found a nested tensor, expected a dense one")
        if value.device.type != "cpu":
            raise InputError(
                f"{where}: found a tensor on {value.device}, expected one on the CPU; call .cpu()"
            )
        try:
            return value.detach().resolve_conj().resolve_neg().contiguous()
        except RuntimeError:  # sparse
            raise InputError(f"{where}: found a {value.layout} tensor, expected a dense one") from None
    try:
        _native.Region.of(value, writable=False)
        return value
    except TypeError:  # strided
        pass
    try:
        return np.ascontiguousarray(np.from_dlpack(value))
    except (RuntimeError, TypeError, BufferError, ValueError):  # such as bfloat16, which NumPy does not have
        raise InputError(
            f"{where}: found a tensor that cannot be read in place, expected a contiguous one"
        ) from None


def empty(kind: Kind, shape: Sequence[int], dtype: str) -> Any:
    """A new tensor to write a result to. JAX arrays cannot be written: NumPy's, until `finish`."""
    if kind == "torch":
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))
    return np.empty(tuple(shape), dtype="uint16" if dtype == "bfloat16" else dtype)


def finish(kind: Kind, array: Any, dtype: str) -> Any:
    """The result in the caller's kind."""
    if kind != "jax":
        return array
    if dtype == "bfloat16":
        array = array.view(sys.modules["ml_dtypes"].bfloat16)
    return sys.modules["jax"].numpy.asarray(array)


def writable(value: Any, shape: Sequence[int], dtype: str, where: str) -> Any:
    """The beginning of the caller's own tensor, with the shape of a result.

    Raises InputError unless it is contiguous, can be written, has this dtype and room for the result.
    """
    count = int(np.prod(shape))
    expected = f"expected contiguous, writable {dtype} with room for {list(shape)}"
    found = f"found {dtype_name(value)}{list(getattr(value, 'shape', ()))}"
    if isinstance(value, np.ndarray):
        is_usable = value.flags.c_contiguous and value.flags.writeable and not value.dtype.hasobject
        size = value.size
    elif kind_of([value]) == "torch":
        is_usable = value.is_contiguous() and value.device.type == "cpu" and not value.requires_grad
        # What is written to a tensor with a pending sign would be read negated.
        is_usable = is_usable and not (value.is_neg() or value.is_conj())
        size = value.numel()
    else:
        raise InputError(
            f"{where}: found a {type(value).__name__}, {expected}: a NumPy array or a torch tensor"
        )
    is_dtype = dtype_name(value) == dtype or (dtype == "bfloat16" and dtype_name(value) == "uint16")
    if not (is_usable and is_dtype and size >= count):
        raise InputError(f"{where}: {found}, {expected}")
    return value.reshape(-1)[:count].reshape(tuple(shape))


def address_range(value: Any) -> tuple[int, int]:
    """First and last address + 1 of a contiguous tensor; (0, 0) where it does not say."""
    if isinstance(value, np.ndarray):
        return value.ctypes.data, value.ctypes.data + value.nbytes
    if kind_of([value]) == "torch":
        return value.data_ptr(), value.data_ptr() + value.numel() * value.element_size()
    return 0, 0
