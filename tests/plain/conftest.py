"""These tests need neither torch nor a compiled program nor the native module; those are hidden from them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HIDDEN = ("torch", "transformers", "executorch", "doubleweave._native")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("plain")


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Importing one of HIDDEN fails, though a test of another folder may have imported it before."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HIDDEN:
            patch.setitem(sys.modules, name, None)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    with hidden():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    # pytest calls this hook for the items of every folder.
    is_ours = item.path.is_relative_to(Path(__file__).parent)
    with hidden() if is_ours else contextlib.nullcontext():
        return (yield)
