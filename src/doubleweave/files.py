"""Whole files: written under another name beside their place, then renamed, so that nobody meets half a file; and what
a large one is known by."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which then takes the place of `path`; after an error the old `path` stays.

    It has the extension of `path`, because some writers choose their format by it, and lies in the same folder, because
    renaming is atomic only within a file system.
    """
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file (hex), read in blocks: it may be larger than memory. Raises OSError."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:  # hashlib.file_digest is of Python 3.11
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; raises OSError, or ValueError for what is no TOML (UnicodeDecodeError: no text)."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(path.read_text())
