"""Where Doubleweave keeps what it can make again, and how a file there is known to be the one that was written."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "DOUBLEWEAVE_CACHE"


def cache_folder() -> Path | None:
    """$DOUBLEWEAVE_CACHE, or doubleweave in the user's cache folder; None where the variable says "off"."""
    named = os.environ.get(VARIABLE, "")
    if named == "off":
        return None
    if named:
        return Path(named)
    try:
        return user_cache() / "doubleweave"
    except RuntimeError:
        return None


def user_cache() -> Path:
    """The folder of all programs' caches; RuntimeError where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def state_of(path: Path) -> list[int]:
    """What changes when somebody writes a file: its size, times and place; [] where it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]
