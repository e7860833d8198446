"""Read a GGUF file, in one part or several: its metadata, and its tensors by name.

Knows nothing of models: what keys and tensors stand for is decided by the callers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from doubleweave.errors import SourceError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Array = np.ndarray[Any, Any]
# What llama.cpp's gguf-split names parts: model-00001-of-00003.gguf.
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufFile:
    """`path` is the first part, `name` the file's name without its part number and ending."""

    path: Path
    name: str
    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, ReaderTensor]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, the slowest axis first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def numbers(self, name: str) -> Callable[[Any], Array]:
        """A function from a slice or indices of the tensor's first axis (of several) to its numbers there, in float32.

        The tensor is mapped for as long as the function lives: what is read of it takes no memory afterwards.
        """
        from gguf import dequantize

        tensor = self.tensors[name]
        mapped: Any = tensor.data
        data = np.memmap(mapped.filename, mapped.dtype, "r", int(tensor.data_offset), mapped.shape)

        def read(rows: Any) -> Array:
            found: Array = dequantize(np.asarray(data[rows]), tensor.tensor_type)
            return found if found.flags.writeable else found.copy()  # float32 is the file itself

        return read

    def weights(self, name: str) -> Array:
        """The tensor `name` in float32, in memory of its own."""
        return self.numbers(name)(slice(None))


def read_gguf(path: Path) -> GgufFile:
    """Open the file, and of a file in parts all of them; raises SourceError for damage and for parts that miss."""
    reader = _open(path)
    count = int(_value(reader, "split.count", 1))
    paths = [path] if count <= 1 else _parts(path, count)
    readers = [reader if part == path else _open(part) for part in paths]
    if count > 1:
        _check_parts(paths, readers, count)
    tensors: dict[str, ReaderTensor] = {}
    for part, found in zip(paths, readers, strict=True):
        for tensor in found.tensors:
            if tensor.name in tensors:
                raise SourceError(f"{part}: holds the tensor {tensor.name} again; fetch it again")
            tensors[tensor.name] = tensor
    try:
        metadata = {key: field.contents() for key, field in readers[0].fields.items()}
        architecture = str(metadata["general.architecture"])
    except Exception as error:
        raise _damaged(path, error) from error
    split = _PART.fullmatch(path.name) if count > 1 else None
    return GgufFile(paths[0], split[1] if split else path.stem, architecture, metadata, tensors)


def check_types(file: GgufFile) -> None:
    """Raise SourceError for a tensor of a type that the package gguf cannot make float32 of."""
    known = _readable()
    for tensor in file.tensors.values():
        if tensor.tensor_type.name not in known:
            raise SourceError(
                f"{file.path}: {tensor.name} is of type {tensor.tensor_type.name}, expected one of {', '.join(known)}; "
                "use another file of the model"
            )


def _open(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:
        raise _damaged(path, error) from error
    if reader.byte_order != "I":  # gguf-py's numbers of such a file are those of swapped bytes
        raise SourceError(
            f"{path}: has the byte order of another kind of machine; convert it with gguf-py's gguf_convert_endian, or "
            "use another file of the model"
        )
    return reader


def _damaged(path: Path, error: Exception) -> SourceError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return SourceError(f"{path}: is not a whole GGUF file ({reason}); fetch it again")


def _value(reader: GGUFReader, key: str, default: Any) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _parts(path: Path, count: int) -> list[Path]:
    """The files of all parts, the first one first."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found[3]) != count:
        raise SourceError(
            f"{path}: is one of {count} parts (split.count), expected a name that ends in -00001-of-{count:05}.gguf; "
            "give the parts the names they were made with, or join them with gguf-split --merge"
        )
    paths = [path.with_name(f"{found[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        raise SourceError(
            f"{path}: is one of {count} parts (split.count), but {', '.join(missing)} is not beside it; fetch all parts"
        )
    return paths


def _check_parts(paths: list[Path], readers: list[GGUFReader], count: int) -> None:
    for number, (part, reader) in enumerate(zip(paths, readers, strict=True)):
        found = (int(_value(reader, "split.no", -1)), int(_value(reader, "split.count", 1)))
        if found != (number, count):
            raise SourceError(
                f"{part}: found split.no {found[0]} and split.count {found[1]}, expected {number} and {count}; fetch "
                "all parts of one model again"
            )
    total = sum(len(reader.tensors) for reader in readers)
    wanted = int(_value(readers[0], "split.tensors.count", total))
    if total != wanted:
        raise SourceError(
            f"{paths[0]}: its {count} parts hold {total} tensors, expected {wanted} (split.tensors.count); fetch all "
            "parts of one model again"
        )


@cache
def _readable() -> tuple[str, ...]:
    """The tensor types that the package gguf can make float32 of."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    # The package lists no such types, so each is tried on a block of zeros.
    found = []
    for kind in GGMLQuantizationType:
        with suppress(NotImplementedError, KeyError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind.name)
    return tuple(found)
