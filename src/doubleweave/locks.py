"""Locks on files and folders, which the system takes back when a process is gone, however it ended."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not Unix
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Hold a file or folder that is there; entering says whether it is held: not where another process does, or nothing
    can be locked."""

    def __init__(self, path: Path, *, waits: bool = True) -> None:
        self._descriptor: int | None = None
        self._is_held = False
        if fcntl is None:
            return
        with suppress(OSError):
            self._descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            self._is_held = True

    def __enter__(self) -> bool:
        return self._is_held

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
