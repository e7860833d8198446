"""A backend's library on this machine, as the run time sees it: one record a backend, found by the backend's name.

So the run time names no vendor, and a backend adds a file. A backend whose delegate or kernels are ExecuTorch's own has
the defaults. This file knows nothing of compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from doubleweave.ir.split import Segment, Split

Segments = Sequence[Segment]


@dataclass(frozen=True)
class Library:
    """`doubleweave.vendors.NAME` defines it as LIBRARY for the backend NAME."""

    is_npu: bool = False  # its device has workers of its own
    loads_alone: bool = False  # it must not load two methods at once
    emulator: str = ""  # stands in for the device here: it is slow, and its crash ends the process
    # Makes itself known to ExecuTorch, before a program's first method is loaded; raises BackendError, and ProgramError
    # for segments that this machine cannot run.
    load: Callable[[Segments], None] = lambda segments: None
    # Why this machine cannot run the segments, "" where it can.
    missing: Callable[[Segments], str] = lambda segments: ""
    # Ends an error's message, from the text that was printed while a method was loaded alone.
    explain: Callable[[str], str] = lambda printed: ""
    # For `doubleweave doctor`: "works", then "missing" or "text", and more for --json.
    examine: Callable[[], dict[str, Any]] = lambda: {"works": True}
    # For `doubleweave inspect`: a program's segments, as data and as text.
    build: Callable[[Segments], dict[str, Any]] | None = None
    build_lines: Callable[[Segments], list[str]] = lambda segments: []


def library_of(backend: str) -> Library:
    """The library of a backend: its vendor's, or the defaults."""
    name = f"doubleweave.vendors.{backend}"
    if not backend.isidentifier() or find_spec(name) is None:
        return Library()
    found = getattr(import_module(name), "LIBRARY", None)
    return found if isinstance(found, Library) else Library()


def libraries_of(split: Split) -> dict[str, Library]:
    """The libraries of a split's backends, by backend."""
    return {name: library_of(name) for name in dict.fromkeys(segment.backend for segment in split.segments)}


def load_libraries(split: Split) -> None:
    """Load the libraries of a split's backends; raises BackendError or ProgramError."""
    for name, library in libraries_of(split).items():
        library.load(split.segments_of(name))


def missing_here(split: Split) -> str:
    """Why a program of this split cannot run on this machine, "" where it can."""
    missing = (library.missing(split.segments_of(name)) for name, library in libraries_of(split).items())
    return next(filter(None, missing), "")


def emulator_of(split: Split) -> str:
    """The name of an emulator that runs segments of the split, "" for none."""
    return next((library.emulator for library in libraries_of(split).values() if library.emulator), "")
