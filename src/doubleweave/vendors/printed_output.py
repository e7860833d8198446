"""The output of native libraries, which passes sys.stdout by and goes to the process's own descriptors 1 and 2."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def captured(function: Callable[[], Result]) -> tuple[Result, str]:
    """Call `function`; returns its result and the text that any thread of the process printed meanwhile.

    An error of `function` carries the text as `printed`, so that a library's own reason is not lost.
    """
    # A file, because a full pipe would stop the library until somebody reads.
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
    """Let nothing more reach the process's standard error: libraries complain there when the process ends."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
