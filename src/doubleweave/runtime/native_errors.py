"""The native module's errors as Doubleweave's. It knows nothing of programs or sessions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from doubleweave import _native
from doubleweave.errors import RunError


@contextmanager
def as_run_errors() -> Iterator[None]:
    """Raise what the native module refuses inside as RunError: a method that fails, memory that it does not get."""
    try:
        yield
    except _native.Error as error:
        raise RunError(_failure(str(error))) from error


def _failure(message: str) -> str:
    """What a method said, without the runtime's own numbers: "method 'm' failed in aten.embedding: …"."""
    found = re.search(r"(method '[^']*' failed): (?:Error::\w+: )?(.*)", message)
    if found is None:
        return message
    check, _, call = found[2].partition("; KernelCall failed")
    operator = re.search(r"operator aten::(\w+)", call)
    return f"{found[1]}{f' in aten.{operator[1]}' if operator else ''}: {check.rstrip('.')}"
