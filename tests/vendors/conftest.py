"""These tests need a vendor's library (Qualcomm's, Intel's), and skip where it is missing."""

from __future__ import annotations

import pytest

import needs


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("vendors")
