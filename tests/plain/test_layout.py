"""Where tests lie: in a folder by what they need, and no file too long to read."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = ("compile", "model", "native", "plain", "programs", "vendors")


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_says_what_its_tests_need(folder):
    assert (TESTS / folder / "conftest.py").read_text().startswith('"""These tests need ')


def test_every_test_file_lies_in_one_of_the_folders():
    found = sorted(TESTS.rglob("test_*.py"))
    assert {path.parent for path in found} == {TESTS / folder for folder in FOLDERS}
    assert len({path.name for path in found}) == len(found)  # pytest imports them by name


def test_no_file_is_longer_than_600_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 600} == {}
