"""Says that memory ran out where that is why something failed, whatever the library that met it made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from doubleweave.compiler.program_folder import Progress
from doubleweave.errors import LowerError

# What torch, the C library and C++ say, lower case. A process that compiled hands on the text alone.
_SIGNS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "memoryerror")


@contextmanager
def naming_memory(report: Progress) -> Iterator[Progress]:
    """Gives what to report to in the place of `report`; inside, memory that runs out is a LowerError."""
    steps = ["beginning"]

    def noting(what: str, done: int, total: int) -> None:
        steps[0] = what
        report(what, done, total)

    try:
        yield noting
    except Exception as error:
        if not ran_out(error):
            raise
        raise LowerError(
            f"memory ran out while {steps[0]}; nothing was written. Close other programs, raise the limit if there is "
            "one (ulimit -v), or compile on a machine with more memory"
        ) from error


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that there was no memory left."""
    while error is not None:
        said = f"{type(error).__name__} {error}".lower()
        if any(sign in said for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False
