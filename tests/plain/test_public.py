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
        "DoubleweaveError",
        "Dynamic",
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


@pytest.mark.executorch
@pytest.mark.parametrize("name", doubleweave.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(doubleweave, name).__doc__


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
    "measure.contention",
    "measure.waits",
    "runtime.llm.sampling",
    "runtime.llm.text",
    "tables",
]


@pytest.mark.parametrize("name", PLAIN)
def test_pure_modules_import_neither_torch_nor_the_native_module(name):
    path = ROOT / f"{name.replace('.', '/')}.py"
    assert not imported_at_the_top(path) & {*COMPILE_TIME, "_native"}


RUN = """
import json, sys
import doubleweave
program = doubleweave.open(sys.argv[1])
result = program.generate([1, 2, 3], max_new_tokens=4)
assert 1 <= result.new_tokens <= 4
program.generate("hi", max_new_tokens=2, temperature=0.7, seed=1)
found = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(found))
"""

COMMANDS = """
import json, sys
from doubleweave.cli.main import main
folder, text = sys.argv[1:]
assert main(["run", folder, "-p", "hi", "-n", "3", "--trace", "--json"]) == 0
assert main(["inspect", folder, "--json"]) == 0
assert main(["bench", folder, "--prompt-len", "9", "--gen", "2", "--runs", "1"]) == 0
assert main(["score", folder, text]) == 0
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.executorch
@pytest.mark.parametrize("code", [RUN, COMMANDS], ids=["python", "commands"])
def test_running_a_program_imports_nothing_of_compiling(code, toy_program_dir, tmp_path):
    import json

    text = tmp_path / "text.txt"
    text.write_text("some text")
    arguments = [str(toy_program_dir)] + ([str(text)] if code is COMMANDS else [])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "numpy" in found
    assert not set(found) & set(COMPILE_TIME)


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


PREDICT = """
import sys
for absent in ("doubleweave._native", "executorch", "torch", "transformers"):
    sys.modules[absent] = None
from doubleweave.cli.main import main
folder, trace = sys.argv[1:]
for profile in ("generic", "sm8650"):
    wanted = ["--profile", profile, "--prompt-len", "200", "--json"]
    assert main(["simulate", folder, *wanted, "--schedule", "wavefront", "--threads", "2", "--trace", trace]) == 0
    assert main(["plan", folder, *wanted]) == 0
assert main(["trace", trace, trace]) == 0
"""


@pytest.mark.executorch  # the program is compiled
def test_predicting_needs_neither_torch_nor_executorch(toy_program_dir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(toy_program_dir), str(tmp_path / "a.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
