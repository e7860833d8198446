"""Hidden folders beside a target: removed at the end, and by the next process where one was killed before its end.

While a process is in one it holds a lock on it, which the system takes back when the process is gone, however it ended.
Knows nothing of what is in them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from doubleweave.locks import Lock

NEW, OLD = "new", "old"  # what is being made, and what steps aside for it
_ASIDE = "program"


@contextmanager
def hidden_folder(target: Path, kind: str = NEW) -> Iterator[Path]:
    """An empty folder on the target's file system, where renaming is one step; OSError where it cannot be made."""
    with Lock(target.parent):  # nobody takes it for abandoned before it is locked
        path = Path(tempfile.mkdtemp(prefix=f"{_prefix(target)}{kind}-", dir=target.parent))
        held = Lock(path)
    try:
        with held:
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """Let the target step aside: the path is where it is meanwhile. It comes back on an error."""
    with hidden_folder(target.absolute(), OLD) as hidden:
        target.rename(hidden / _ASIDE)  # as it was given: the system refuses to move "."
        try:
            yield hidden / _ASIDE
        except BaseException:
            (hidden / _ASIDE).rename(target)
            raise


def remove_abandoned(target: Path) -> None:
    """Remove what killed processes left beside the target; a target that had stepped aside for one comes back."""
    if not target.parent.is_dir():
        return
    with Lock(target.parent) as is_alone:
        found = [path for path in target.parent.iterdir() if path.name.startswith(_prefix(target))]
        for path in found if is_alone else ():
            with Lock(path, waits=False) as is_free:
                if not is_free:
                    continue  # another process writes it
                if not target.exists() and (path / _ASIDE).exists() and OLD in path.name:
                    (path / _ASIDE).rename(target)
                shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    return f".{target.name}.doubleweave-"
