"""What `import doubleweave` promises, and what it must not drag in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import doubleweave

# Needs of compiling, which a phone or a server that only runs programs does not have.
COMPILE_TIME = ("torch", "transformers", "executorch", "torchao", "gguf", "safetensors")


def test_public_names():
    assert doubleweave.__all__ == [
        "BackendError",
        "CheckError",
        "DoubleweaveError",
        "Dynamic",
        "Encoder",
        "Generation",
        "InputError",
        "LowerError",
        "Method",
        "ModuleProgram",
        "ModuleSession",
        "PolicyError",
        "Program",
        "ProgramError",
        "Result",
        "RunError",
        "Sampling",
        "ScheduleError",
        "Session",
        "SourceError",
        "SplitError",
        "States",
        "Static",
        "Timeline",
        "compile",
        "compile_llm",
        "open",
    ]
    assert doubleweave.__all__ == sorted(doubleweave.__all__)


def modules() -> list[Path]:
    return sorted(Path(doubleweave.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_every_module_says_what_it_is(path):
    source = path.read_text()
    assert not source or ast.get_docstring(ast.parse(source))


def imported_at_the_top(path: Path) -> set[str]:
    """First names of the modules that importing the file imports (not those inside functions)."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


ROOT = Path(doubleweave.__file__).parent
# Packages and files that neither compile nor run anything.
PLAIN = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for part in ("ir", "schedule", "timeline", "predict")
    for path in sorted((ROOT / part).rglob("*.py"))
] + [
    "cli.show_memory",
    "cli.show_profile",
    "errors",
    "files",
    "measure.contention_fit",
    "measure.waits",
    "runtime.llm.sampling",
    "runtime.llm.text",
    "tables",
]


@pytest.mark.parametrize("name", PLAIN)
def test_pure_modules_import_neither_torch_nor_the_native_module(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert not imported_at_the_top(path) & {*COMPILE_TIME, "_native"}


def test_plain_modules_need_neither_the_native_module_nor_executorch():
    code = f"""
import importlib, sys
for absent in ("doubleweave._native", "executorch", "torch"):
    sys.modules[absent] = None
for name in {PLAIN}:
    importlib.import_module("doubleweave." + name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
