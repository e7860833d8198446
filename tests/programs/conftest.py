"""These tests need a compiled toy program, and so the compile extra; a program once compiled needs none of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import needs


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("programs")


@pytest.fixture(scope="session")
def third_party() -> str:
    """The folder of sources that a build of doubleweave-run has fetched already, "" for none."""
    found = (Path(__file__).parents[2] / "build").glob("*/third_party/pytorch_tokenizers-*/")
    return str(next(found, ""))
