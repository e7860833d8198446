"""These tests need torch and the compile extra: they compile."""

from __future__ import annotations

import pytest

import needs


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("compile")
