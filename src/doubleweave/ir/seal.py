"""Seals: a JSON file of a program folder ends with the digest of all that stands before it.

One changed byte is found before anything is read from the file. It is no protection against somebody who changes a
file on purpose. doubleweave-run reads the same seals (native/runner/run_file.cpp); it knows nothing of what is sealed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from doubleweave import _scheduling

_BEFORE, _AFTER = b',\n "seal": "', b'"\n}\n'


def sealed(data: dict[str, Any], indent: int | None = None) -> bytes:
    """The bytes of a file with `data` and its seal."""
    text = json.dumps(data, indent=indent).encode()[:-1].rstrip()
    return b"".join((text, _BEFORE, _digest(text), _AFTER))


def is_whole(data: bytes) -> bool:
    """Whether the file has a seal, and it is of what stands before it."""
    text, _, seal = data.rpartition(_BEFORE)
    return seal == _digest(text) + _AFTER


def _digest(data: bytes) -> bytes:
    digest: str = _scheduling.digest(data)
    return digest.encode()


def digest_of(path: Path) -> str:
    """The digest of a file; "" where there is none."""
    return _digest(path.read_bytes()).decode() if path.exists() else ""


def chunk_digests(path: Path) -> list[str]:
    """The digests of a file's chunks of a mebibyte, by which doubleweave-run checks what it loads."""
    with open(path, "rb") as file:
        return [
            _scheduling.digest(chunk)
            for chunk in iter(lambda: file.read(_scheduling.DIGEST_CHUNK_BYTES), b"")
        ]
