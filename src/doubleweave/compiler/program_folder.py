"""The program folder on disk: made beside its place and renamed into it, so that nothing half-written is left."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from doubleweave.compiler.hidden_folders import aside, hidden_folder, remove_abandoned
from doubleweave.errors import LowerError
from doubleweave.ir.manifest import MANIFEST_FILE, PROGRAM_FILE, RUN_FILE, STATE_FILE, TOKENIZER_FILE

# Gets (what is being done, steps done, steps in all).
Progress = Callable[[str, int, int], None]


def counted(report: Progress, total: int) -> Callable[[str], None]:
    """A function that reports the next of `total` steps by its name. Steps beyond `total` count as the last."""
    numbers = itertools.count(1)
    return lambda what: report(what, min(next(numbers), total), total)


def check_target(folder: Path, option: str = "-o") -> None:
    """Raises LowerError unless the folder may be written; the message says that `option` names another folder."""
    if folder.exists() and not folder.is_dir():
        raise LowerError(f"{folder}: is a file, expected a folder to write; choose another one with {option}")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # The whole folder is replaced, so nothing that is not ours may be in it.
    ours = {PROGRAM_FILE, MANIFEST_FILE, TOKENIZER_FILE, STATE_FILE, RUN_FILE}
    if found and (PROGRAM_FILE not in found or found - ours):
        raise LowerError(
            f"{folder}: is a folder with other files in it, expected an empty or missing folder or an older "
            f"program; choose another one with {option}"
        )


@contextlib.contextmanager
def made_beside(folder: Path, option: str = "-o") -> Iterator[Path]:
    """A temporary folder to fill. It takes the place of `folder` at the end, and is removed on an error.

    What a killed process left of one is removed first. Raises LowerError where the folder cannot be made or written.
    """
    target = folder.absolute()
    problem = "made"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
        with hidden_folder(target) as temporary:
            problem = "written"
            yield temporary
            _replace(temporary, folder)
    except OSError as error:
        raise LowerError(
            f"{folder}: cannot be {problem}: {error.strerror}; choose another folder with {option}"
        ) from error


def _replace(temporary: Path, folder: Path) -> None:
    """Put the finished directory in its place; an older program goes only once the new one is there."""
    # Hidden folders are such that only their owner may read them.
    os.chmod(temporary, 0o777 & ~_umask())
    if not folder.exists():
        temporary.rename(folder)
        return
    # A folder with files in it cannot be renamed over, so the older program steps aside first.
    with aside(folder):
        temporary.rename(folder)


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
