"""Load a GGUF file: transformers dequantizes its weights to float32 and rebuilds its tokenizer."""

from __future__ import annotations

from pathlib import Path

from doubleweave.errors import SourceError
from doubleweave.models.hugging_face import load_pretrained
from doubleweave.models.model import Model


def load(path: Path) -> Model:
    """Load the file; raises SourceError for damage and for architectures transformers cannot read."""
    architecture = _architecture(path)
    supported = _supported()
    if architecture not in supported:
        raise SourceError(
            f"{path}: found architecture {architecture!r}, expected one of {', '.join(sorted(supported))}"
        )
    return load_pretrained(path.parent, name=path.stem, gguf_file=path.name)


def _architecture(path: Path) -> str:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.fields["general.architecture"]
        return str(field.contents())
    except Exception as error:
        raise SourceError(
            f"{path}: is not a whole GGUF file ({type(error).__name__}: {str(error)[:200]}); fetch it again"
        ) from error


def _supported() -> set[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return set(GGUF_SUPPORTED_ARCHITECTURES)
