"""These tests need the built native module, and torch, which lowers the small methods that they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import needs


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("native")


@pytest.fixture(scope="session")
def toy_path(made_once: Callable[..., Path]) -> Path:
    """The path of a program of small methods (native_toys.py)."""
    from native_toys import toy_program

    return made_once("toy.pte", toy_program)


@pytest.fixture(scope="module")
def program(toy_path: Path) -> Any:
    from doubleweave import _native

    return _native.Program(str(toy_path))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    from doubleweave import _native

    _native.set_intra_op_threads(1)
