"""Keeps Python out of the way while something is compiled. Knows nothing of models.

Compiling is Python for the most part: torch traces, and ExecuTorch runs some hundred passes over each segment. What is
kept away here takes two fifths of the time that a small model needs, and does nothing for it.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Objects that are made between two collections: Python's own 700 are made by one operator that is traced.
_COLLECT_AFTER = 50_000
# Slots of 8 bytes. Half a megabyte is some thousand frames, deeper than anything here goes.
_WIDE = 1 << 17
_MAKE_OPERATORS, _REGISTERED = "_materialize_cpp_cia_ops", "_dispatch_get_registrations_for_dispatch_key"


def with_less_overhead(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that runs with a frozen heap, rare collections, room for its frames, and operators listed once; nested
    ones change nothing."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import executorch.exir  # noqa: F401  what is imported later is not frozen

        with _frozen_heap(), _operators_listed_once():
            return on_wide_frame(function)(*args, **kwargs)

    return run


def on_wide_frame(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function, above a frame so large that those of what it calls lie behind it.

    Python 3.11 keeps frames in chunks of 16 KiB, which it maps when a call crosses the end of one and unmaps when that
    call returns (pystate.c, push_chunk). A loop that happens to call across an end maps memory at every turn: half a
    million times for six small models, a fifth of the time. A chunk is as large as the frame that it is made for,
    rounded up to a power of two, and what is left of it is for the frames above.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        result: _R = _wide(function, args, kwargs)
        return result

    return run


def _wide(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


_wide.__code__ = _wide.__code__.replace(co_stacksize=_WIDE)


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """The garbage collector leaves alone what there is: torch, transformers and ExecuTorch are two million objects.

    What is made inside is collected as ever, but not as often. Where something is frozen already, nothing happens.
    """
    if gc.get_freeze_count():
        yield
        return
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def _operators_listed_once() -> Iterator[None]:
    """torch makes Python objects of the dispatcher's composite operators once for each namespace of each decomposition,
    which is a tenth of the time. They stay, so it does that again only when more operators were registered."""
    import torch
    from torch._export import utils

    make: Callable[[], None] | None = getattr(utils, _MAKE_OPERATORS, None)
    registered: Callable[[str], Any] | None = getattr(torch._C, _REGISTERED, None)
    if make is None or registered is None:  # another torch
        yield
        return
    known = -1

    def make_new() -> None:
        nonlocal known
        if (number := len(registered("CompositeImplicitAutograd"))) != known:
            make()
            known = number

    setattr(utils, _MAKE_OPERATORS, make_new)
    try:
        yield
    finally:
        setattr(utils, _MAKE_OPERATORS, make)
