"""Run a program in a process of its own: what its library leaves behind, or its crash, does not reach this one.

The process gets what to run and sends what came out over two pipes; its own output goes to a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from doubleweave.check.program_run import Array, ProgramHere, Run
from doubleweave.errors import DoubleweaveError, RunError, first_line
from doubleweave.ir import manifest
from doubleweave.runtime.open import open_llm

if TYPE_CHECKING:
    from torch import Tensor


class ProgramApart(NamedTuple):
    """The program of the other process. `ask` raises RunError where that cannot run it."""

    names: tuple[str, ...]
    ask: Callable[..., Any]

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]:
        """By name, functions of tensors that give a tensor, or several."""
        return {name: partial(self._call, name) for name in self.names}

    def logits(self, run: Run) -> Array:
        found: Array = self.ask("logits", run)
        return found

    def _call(self, name: str, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        import torch  # the other process does without

        results = self.ask("method", name, *(tensor.numpy() for tensor in inputs))
        tensors = tuple(torch.from_numpy(result) for result in results)
        return tensors if len(tensors) > 1 else tensors[0]


@contextmanager
def program_apart(folder: Path) -> Iterator[ProgramApart]:
    """The program of a folder in a new process, which ends with the context."""
    names = tuple(name for found in manifest.read(folder).split.segments for name in found.methods())
    to_read, from_here = os.pipe()
    from_there, to_write = os.pipe()
    with tempfile.TemporaryFile() as printed:
        command = [
            sys.executable,
            "-m",
            "doubleweave.check.own_process",
            str(folder),
            str(to_read),
            str(to_write),
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, pass_fds=(to_read, to_write)
        )
        os.close(to_read)
        os.close(to_write)
        with (
            Connection(from_here, readable=False) as asking,
            Connection(from_there, writable=False) as answers,
        ):

            def ask(*what: Any) -> Any:
                try:
                    asking.send(what)
                    is_right, found = answers.recv()
                except (EOFError, OSError):
                    printed.seek(0)
                    said = printed.read().decode(errors="replace").strip().splitlines()
                    raise RunError(
                        f"the process that runs the program ended in the middle of {' '.join(map(str, what[:2]))[:60]} "
                        f"(it said: {said[-1][:200] if said else 'nothing'})"
                    ) from None
                if not is_right:
                    raise RunError(found)
                return found

            try:
                yield ProgramApart(names, ask)
            finally:
                process.kill()  # what an emulator prints when it ends takes long, and nobody reads it
                process.wait()


def _serve(folder: Path, asked: Connection, answers: Connection) -> None:
    program: ProgramHere | None = None
    while True:
        try:
            what, *given = asked.recv()
        except EOFError:
            return
        try:
            program = program or ProgramHere(open_llm(folder, keeps_packed=False))
            answers.send((True, _answer(program, what, *given)))
        except DoubleweaveError as error:
            answers.send((False, first_line(error, most=400)))


def _answer(program: ProgramHere, what: str, *given: Any) -> Any:
    if what == "logits":
        return program.logits(*given)
    name, *inputs = given
    results = program.methods[name](*inputs)
    return [np.asarray(result) for result in (results if isinstance(results, tuple) else (results,))]


if __name__ == "__main__":
    _serve(
        Path(sys.argv[1]),
        Connection(int(sys.argv[2]), writable=False),
        Connection(int(sys.argv[3]), readable=False),
    )
    os._exit(0)
