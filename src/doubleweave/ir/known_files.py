"""Large files whose SHA-256 was computed before: they are known again by size, times and place.

Whoever changes a file changes its times. What changes without them (a disk that loses a bit) is found where the file is
checked in full: at its first opening, and on request.
"""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path

from doubleweave.files import written_whole
from doubleweave.ir.cache_folder import cache_folder, state_of

LEAST_BYTES = 64 << 20  # what is smaller is hashed in less time than anybody notices
_FOLDER = "known"
_MOST_FILES = 16  # of one digest: copies of a program
_TICK_NS = 2_000_000_000  # a change so soon after the last one may have the same time


def is_known(path: Path, sha256: str) -> bool:
    """Whether the file had this digest when it was hashed last, and was not written since."""
    return state_of(path) in _states(sha256)


def note(path: Path, sha256: str) -> None:
    """Remember that the file has this digest, if it is large. Where the cache cannot be written nothing happens."""
    record, state = _record(sha256), state_of(path)
    if record is None or not state or state[0] < LEAST_BYTES or time.time_ns() - state[2] < _TICK_NS:
        return
    states = [state, *(other for other in _states(sha256) if other[3:] != state[3:])]
    with suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(record) as temporary:
            temporary.write_text(json.dumps(states[:_MOST_FILES]))


def forget_all() -> None:
    folder = cache_folder()
    if folder is not None:
        shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def _states(sha256: str) -> list[list[int]]:
    record = _record(sha256)
    try:
        found = [] if record is None else json.loads(record.read_text())
    except (OSError, ValueError):
        return []
    return [state for state in found if isinstance(state, list)] if isinstance(found, list) else []


def _record(sha256: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / _FOLDER / f"{sha256}.json"
