"""Loaded methods of one program, as few as the schedules in use need.

It knows nothing of schedules: it loads what it is asked for, once.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from doubleweave import _native
from doubleweave.errors import ProgramError
from doubleweave.ir.manifest import PROGRAM_FILE
from doubleweave.ir.split import Split
from doubleweave.schedule.scratch_groups import groups
from doubleweave.vendors.library import libraries_of, load_libraries
from doubleweave.vendors.printed_output import captured


class Instances:
    """Instances by (method, copy).

    Copy 0 serves all workers, one at a time. Further copies of a method without weights let several workers run it
    at the same time.
    """

    def __init__(self, program: _native.Program, split: Split, packed: _native.PackedWeights) -> None:
        self._program = program
        self._packed = packed
        self._weight_bytes = {
            method: segment.weight_bytes for segment in split.segments for method in segment.methods()
        }
        # Blocks share a few scratch regions: with one each, a block would keep about 3 MB (docs/design.md).
        shared = groups(split)
        self._groups = {
            method: shared.get(segment.name, -1) for segment in split.segments for method in segment.methods()
        }
        self._alone = {
            method: library.explain
            for backend, library in libraries_of(split).items()
            if library.loads_alone
            for segment in split.segments_of(backend)
            for method in segment.methods()
        }
        self._loaded: dict[tuple[str, int], _native.Instance] = {}
        self.turns = _native.Turns()  # of calls from several threads that use a common method
        self._loading = threading.Lock()

    def get(self, method: str, copy: int = 0) -> _native.Instance:
        """Load the method on first use; raises ProgramError when the program does not have it."""
        key = (method, copy)
        if key not in self._loaded:
            self._loaded[key] = self._load_alone(method) if method in self._alone else self._load(method)
        return self._loaded[key]

    def load_all(self, methods: list[str]) -> None:
        """Load several methods on several threads: loading mostly packs weights, without the GIL."""
        with self._loading:
            for method in self._alone.keys() & set(methods):
                self.get(method)
            todo = [method for method in dict.fromkeys(methods) if (method, 0) not in self._loaded]
            with ThreadPoolExecutor(max_workers=_native.max_threads()) as pool:
                for method, instance in zip(todo, pool.map(self._load, todo), strict=True):
                    self._loaded[method, 0] = instance

    def _load_alone(self, method: str) -> _native.Instance:
        """Load a method of a backend that prints while it loads; an error carries the printed text.

        Such a library sets up without a lock what its methods share: two must not load at the same time.
        """
        try:
            return captured(lambda: self._load(method))[0]
        except ProgramError as error:
            raise ProgramError(f"{error}{self._alone[method](getattr(error, 'printed', ''))}") from error

    def _load(self, method: str) -> _native.Instance:
        try:
            group, weight_bytes = self._groups.get(method, -1), self._weight_bytes.get(method, 0)
            return self._packed.load(self._program, method, group, weight_bytes)
        except _native.Error as error:
            raise ProgramError(f"{self._program.path}: {error}") from error

    def trim(self) -> None:
        """Release the program file's resident pages; a prefill touches many of the embedding table's."""
        self._program.trim()

    def __len__(self) -> int:
        return len(self._loaded)


def open_instances(folder: Path, split: Split, packed: _native.PackedWeights | None = None) -> Instances:
    """Load the libraries that the split needs, and open a folder's program file; `packed`: where its packed weights are
    kept.

    Raises BackendError where a library is missing, ProgramError where the program does not have the methods of the
    split or cannot run on this machine.
    """
    load_libraries(split)
    try:
        program = _native.Program(str(folder / PROGRAM_FILE))
    except _native.Error as error:
        raise ProgramError(f"{error}; compile the program again") from error
    wanted = {name for segment in split.segments for name in segment.methods()}
    if missing := sorted(wanted - set(program.method_names)):
        raise ProgramError(
            f"{folder}: method {missing[0]!r} of the manifest is not in the program; compile it again"
        )
    return Instances(program, split, packed or _native.PackedWeights())
