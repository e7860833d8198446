"""Weights as XNNPACK packs them, in files that are mapped: made when a large program is opened first.

XNNPACK lays weights out anew for the processor's kernels whenever a method is loaded, which takes a second for a
gigabyte, and holds them in memory of its own. A file a method has the result, for one program, one build and one kind
of processor; all processes map the same file. A file that was changed since it was written is not used, and neither is
one that was not written to its end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from doubleweave import _native
from doubleweave.files import written_whole
from doubleweave.ir.cache_folder import cache_folder, state_of
from doubleweave.ir.split import Split
from doubleweave.locks import Lock

LEAST_BYTES = 256 << 20  # of a program's weights: less is packed in a moment
_LEAST_OF_A_METHOD = 1 << 20
MOST_BYTES = 16 << 30  # of all programs together
_LONGEST_PATH = 255  # XNNPACK's delegate cuts longer ones
_ABOUT = "about.txt"


class PackedWeights:
    """The packed weights of one program; `folder` None keeps none."""

    def __init__(self, folder: Path | None = None, methods: Set[str] = frozenset()) -> None:
        self._folder, self._methods = folder, methods

    @contextmanager
    def path_of(self, method: str) -> Iterator[str]:
        """The file for a method while it is loaded, "" where its weights are packed in memory."""
        path = None if self._folder is None or method not in self._methods else self._folder / method
        if path is None:
            yield ""
        elif _is_whole(path):
            yield str(path)
        else:
            with suppress(OSError):  # the folder is gone, or cannot be written
                _beside(path, ".lock").touch(0o600)
            with Lock(_beside(path, ".lock"), waits=False) as is_alone:  # another process may be writing it
                if is_alone:
                    path.unlink(missing_ok=True)
                yield str(path) if is_alone else ""
                if is_alone:
                    _note(path)


class Kept(NamedTuple):
    """The packed weights of a program in the cache: what it is called, their bytes, when they were used last (seconds
    since 1970)."""

    name: str
    num_bytes: int
    used: float
    folder: Path


def packed_weights(split: Split, digest: str, name: str) -> PackedWeights:
    """The packed weights of the program with this SHA-256; none are kept where it is small, or the disk is full."""
    root = _root()
    total = sum(segment.weight_bytes for segment in split.segments)
    if root is None or total < LEAST_BYTES:
        return PackedWeights()
    folder = root / f"{digest[:32]}-{_machine()}"
    methods = {
        method
        for segment in split.segments
        if segment.weight_bytes >= _LEAST_OF_A_METHOD
        for method in segment.methods()
    }
    if any(len(os.fsencode(folder / method)) > _LONGEST_PATH for method in methods):
        return PackedWeights()
    try:
        if not folder.exists():
            root.mkdir(parents=True, exist_ok=True)
            make_room(folder, total)
            if shutil.disk_usage(root).free <= 2 * total:
                return PackedWeights()
            folder.mkdir(exist_ok=True)
            (folder / _ABOUT).write_text(name)
        os.utime(folder)
    except OSError:
        return PackedWeights()
    return PackedWeights(folder, methods)


def kept() -> list[Kept]:
    """What the cache has, the longest unused first."""
    root = _root()
    found = []
    for folder in root.iterdir() if root is not None and root.is_dir() else ():
        with suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            about = folder / _ABOUT
            name = about.read_text() if about.exists() else "?"
            found.append(Kept(name, size, folder.stat().st_mtime, folder))
    return sorted(found, key=lambda each: each.used)


def make_room(needed_by: Path | None = None, num_bytes: int = 0, most: int = MOST_BYTES) -> int:
    """Remove what was not used for longest, until so many bytes fit; returns the bytes removed. A program that is
    running keeps what it has mapped."""
    removed = 0
    programs = [each for each in kept() if each.folder != needed_by]
    total = num_bytes + sum(each.num_bytes for each in programs)
    for each in programs:
        if total <= most:
            break
        shutil.rmtree(each.folder, ignore_errors=True)
        total -= each.num_bytes
        removed += each.num_bytes
    return removed


def _root() -> Path | None:
    folder = cache_folder()
    # Resolved: locks are found by the path that the system knows a file by (release_locks in program.cpp).
    return None if folder is None else folder.resolve() / "packed"


def _machine() -> str:
    """Of what the layout depends on: the build of the run time, and the processor."""
    build = Path(_native.__file__).stat()
    parts = [f"{build.st_size} {build.st_mtime_ns}"]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)  # names of methods have dots


def _is_whole(path: Path) -> bool:
    try:
        noted = json.loads(_beside(path, ".json").read_text())
    except (OSError, ValueError):
        return False
    return bool(noted) and state_of(path) == noted


def _note(path: Path) -> None:
    """Say that the file was written to its end: XNNPACK has written its index, and waited for the disk."""
    with suppress(OSError):
        path.chmod(0o444)
        with written_whole(_beside(path, ".json")) as temporary:
            temporary.write_text(json.dumps(state_of(path)))
