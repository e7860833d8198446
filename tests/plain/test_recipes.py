"""CONTRIBUTING's lists of files to touch: the files exist, and what is said to be listed there is listed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from doubleweave.compiler.backends import backends
from doubleweave.schedule.makers import MAKERS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(re.findall(r"^## (Add an? \w+).*?\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
# Stand for any file of their kind.
PLACEHOLDERS = {"NAME": "qnn", "COMMAND": "predict"}


def named_files(text: str) -> list[str]:
    """The paths that a recipe names; those within src/doubleweave may be short of it."""
    return re.findall(r"`?((?:[\w.]+/)+\w+\.(?:py|cpp|h|md|toml))`?", text)


def test_there_is_a_recipe_for_everything_that_people_add():
    assert set(RECIPES) == {
        "Add a backend",
        "Add a recipe",
        "Add a model",
        "Add a maker",
        "Add an option",
    }


@pytest.mark.parametrize("title", sorted(RECIPES))
def test_the_files_of_a_recipe_exist(title):
    files = named_files(RECIPES[title])
    assert len(files) >= 3
    for name in files:
        if name.endswith("sources/NAME.py"):
            name = name.replace("NAME", "gguf")
        for placeholder, example in PLACEHOLDERS.items():
            name = name.replace(placeholder, example)
        assert any((ROOT / folder / name).exists() for folder in ("", "src/doubleweave")), name


def test_every_backend_has_the_file_that_its_recipe_says():
    for name in backends():
        record = ROOT / "src" / "doubleweave" / "compiler" / "backends" / name / "__init__.py"
        assert "BACKEND" in record.read_text()


def test_a_maker_is_named_in_one_place_and_shown_in_the_others():
    header = (ROOT / "native/include/doubleweave/scheduling/choice.h").read_text()
    for name in MAKERS:
        assert f'"{name}"' in header
        assert f"`{name}`" in (ROOT / "docs" / "schedules.md").read_text()
        assert name in (ROOT / "src/doubleweave/cli/options.py").read_text()


def test_every_source_is_taken_by_load_and_tested():
    sources = ROOT / "src" / "doubleweave" / "sources"
    text = (sources / "__init__.py").read_text()
    loads = [path.stem for path in sources.glob("*.py") if "\ndef load(" in path.read_text()]
    tests = "".join(path.name + path.read_text() for path in (ROOT / "tests" / "compile").glob("test_*.py"))
    assert "gguf" in loads
    for name in set(loads) - {"__init__"}:
        assert f"{name}.load(" in text
        assert name in tests
