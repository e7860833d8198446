"""Load a GGUF file: transformers dequantizes its weights to float32 and rebuilds its tokenizer."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path

from doubleweave.errors import SourceError
from doubleweave.sources.hugging_face import load_pretrained
from doubleweave.sources.model import Model


def load(path: Path) -> Model:
    """Load the file; raises SourceError for damage and for architectures transformers cannot read."""
    architecture, unread = _examine(path)
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES as supported

    if architecture not in supported:
        raise SourceError(
            f"{path}: found architecture {architecture!r}, expected one of {', '.join(sorted(set(supported)))}"
        )
    if unread:
        raise SourceError(
            f"{path}: {unread[0]} is of type {unread[1]}, expected one of {', '.join(_readable())}; use another file "
            "of the model"
        )
    return load_pretrained(path.parent, name=path.stem, gguf_file=path.name)


def _examine(path: Path) -> tuple[str, tuple[str, str] | None]:
    """The architecture, and the first tensor of a type that cannot be read, with the type."""
    from gguf import GGUFReader

    known = _readable()
    try:
        reader = GGUFReader(path)
        field = reader.fields["general.architecture"]
        types = ((tensor.name, tensor.tensor_type.name) for tensor in reader.tensors)
        return str(field.contents()), next((found for found in types if found[1] not in known), None)
    except Exception as error:
        raise SourceError(
            f"{path}: is not a whole GGUF file ({type(error).__name__}: {str(error)[:200]}); fetch it again"
        ) from error


@cache
def _readable() -> tuple[str, ...]:
    """The tensor types that the package gguf can make float32 of."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    # The package lists no such types, so each is tried on a block of zeros.
    found = []
    for kind in GGMLQuantizationType:
        with suppress(NotImplementedError, KeyError):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind.name)
    return tuple(found)
