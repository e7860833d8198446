"""The drawings of the packages in docs/design.md against the imports of the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import doubleweave

PACKAGE = Path(doubleweave.__file__).parent
REPOSITORY = Path(__file__).parents[2]
DESIGN = REPOSITORY / "docs" / "design.md"
BUILD = REPOSITORY / "CMakeLists.txt"

Floors = list[dict[str, str]]  # from the top: what each name on a floor is for


def drawings() -> dict[str, Floors]:
    """Each drawing in docs/design.md, by the dotted name of the package that it shows."""
    found: dict[str, Floors] = {}
    for folder, lines in re.findall(r"```text\nsrc/(\S+)\n(.*?)```", DESIGN.read_text(), re.DOTALL):
        floors: Floors = [{}]
        for line in lines.splitlines():
            if line.strip() == "▼":
                floors.append({})
            else:
                name, _, purpose = line.partition(" ")
                floors[-1][name] = purpose.strip()
        found[folder.replace("/", ".")] = floors
    return found


def imports_of(path: Path) -> set[str]:
    """The dotted names that a file imports, at its top, inside functions and for type checkers."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: found a relative import, expected an absolute one"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def folder_of(package: str) -> Path:
    return PACKAGE.joinpath(*package.split(".")[1:])


def part_of(package: str, dotted: str) -> str | None:
    """The part of a package that a dotted name lies in; None for a name that lies elsewhere."""
    if not f"{dotted}.".startswith(f"{package}."):
        return None
    part = dotted.removeprefix(package).strip(".").partition(".")[0]
    return part if part in parts_of(package) else "__init__"


def parts_of(package: str) -> set[str]:
    """The packages and files in a package; native modules as the build names them."""
    folder = folder_of(package)
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    native = re.findall(r"nanobind_add_module\((\w+)", BUILD.read_text()) if package == "doubleweave" else []
    return folders | {path.stem for path in folder.glob("*.py")} | set(native)


def test_design_has_the_drawings():
    assert set(drawings()) == {"doubleweave", "doubleweave.compiler", "doubleweave.runtime"}


@pytest.mark.parametrize("package", drawings())
def test_every_part_is_drawn_once_with_its_purpose(package):
    drawn = [item for floor in drawings()[package] for item in floor.items()]
    expected = parts_of(package) - ({"__init__"} if "." in package else set())
    assert sorted(name for name, _ in drawn) == sorted(expected)
    assert all(purpose for _, purpose in drawn)


@pytest.mark.parametrize("package", drawings())
def test_imports_point_down(package):
    floor_of = {name: number for number, floor in enumerate(drawings()[package]) for name in floor}
    wrong = []
    for path in sorted(folder_of(package).rglob("*.py")):
        part = path.relative_to(folder_of(package)).with_suffix("").parts[0]
        for dotted in sorted(imports_of(path)):
            imported = part_of(package, dotted)
            if imported not in (None, part) and floor_of[imported] <= floor_of.get(part, -1):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {dotted}")
    assert not wrong


def test_native_module_is_imported_by_these_alone():
    """Predicting a run needs no ExecuTorch: `ir`, `schedule`, `timeline` and `predict` are not among them."""
    importers = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if any(part_of("doubleweave", dotted) == "_native" for dotted in imports_of(path))
    }
    outside = {name for name in importers if not name.startswith("runtime.")}
    assert outside == {"cli.doctor", "cli.options", "entries.compile_module", "vendors.qnn_sdk"}
