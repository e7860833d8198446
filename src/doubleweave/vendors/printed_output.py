"""What native libraries print: past Python's sys.stdout, to the process's own standard output and error."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def captured(function: Callable[[], Result]) -> tuple[Result, str]:
    """Call `function`; returns its result and what was printed meanwhile, by any thread of the process.

    Where it raises, what was printed is in the error's `printed`, so that a library's own reason is not lost.
    """
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        before = {number: os.dup(number) for number in (1, 2)}
        for number in before:
            os.dup2(file.fileno(), number)

        def printed() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            result = function()
        except Exception as error:
            error.printed = printed()  # type: ignore[attr-defined]
            raise
        finally:
            for number, copy in before.items():
                os.dup2(copy, number)
                os.close(copy)
        return result, printed()


def silence_errors() -> None:
    """Let nothing more reach the process's standard error: for what libraries say when the process ends."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
