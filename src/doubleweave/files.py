"""Whole files: written under another name beside their place, then renamed, so that nobody meets half a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
