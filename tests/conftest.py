"""Fixtures of several folders: toy programs compiled once a run, the command line, and golden files.

Each folder has a conftest.py of its own, which says what its tests need and gives them the marker of that name.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import toys
from doubleweave.compiler.less_overhead import freeze_heap, on_wide_frame

# Property tests must not depend on how busy the machine is, nor on a run before.
hypothesis.settings.register_profile("doubleweave", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("doubleweave")

# transformers and tokenizers may look for updates otherwise; nothing here needs the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests of what is kept there have a folder of their own.
os.environ["DOUBLEWEAVE_CACHE"] = "off"

# Two workers with two threads each would wait for one another on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


# Minutes each. They come first: a worker that begins one when the other has nothing left keeps it waiting.
LONG_FILES = (
    *("test_native_run_sanitized.py", "test_aarch64.py", "test_random_modules.py"),
    *("test_readme.py", "test_right.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # All that tests import is there now, and need not be gone through again for what each of them leaves behind.
    freeze_heap()
    gc.set_threshold(gc.get_threshold()[0], 20, 20)
    for item in items:  # most tests compile something (compiler/less_overhead.py)
        if isinstance(item, pytest.Function):
            item.obj = on_wide_frame(item.obj)
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="rewrite tests/golden instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME, or write it there with --regenerate."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text + "\n")
        assert text + "\n" == path.read_text()

    return compare


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what the workers of a run share, and a run that a test starts with SHARED_FOLDER."""
    base = tmp_path_factory.getbasetemp()
    is_worker = hasattr(request.config, "workerinput")
    folder = Path(os.environ.get("SHARED_FOLDER") or (base.parent if is_worker else base) / "shared")
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def made_once(shared: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)` is a path that `make` has written: the first worker calls it, the others wait."""

    def made(name: str, make: Callable[[Path], object]) -> Path:
        from filelock import FileLock

        path, is_made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not is_made.exists():
                make(path)
                is_made.touch()
        return path

    return made


def _compile(made_once: Callable[..., Path], name: str, **options: Any) -> Path:
    import doubleweave

    return made_once(name, lambda folder: doubleweave.compile_llm(toys.model(), folder, **options))


@pytest.fixture(scope="session")
def toy_program_dir(made_once: Callable[..., Path]) -> Path:
    """The toy in float32, bounded rows. Tests must not change it; `toy_copy` may be changed."""
    return _compile(made_once, "bounded", quantize="none", chunk=(32,))


@pytest.fixture(scope="session")
def toy_static_dir(made_once: Callable[..., Path]) -> Path:
    """The toy in float32, fixed sizes 1, 8 and 32."""
    return _compile(made_once, "static", quantize="none", shape="static", chunk=(1, 8, 32))


@pytest.fixture(scope="session")
def toy_8da8w_dir(made_once: Callable[..., Path]) -> Path:
    return _compile(made_once, "8da8w", quantize="8da8w", chunk=(32,))


@pytest.fixture(scope="session")
def toy_8da4w_dir(made_once: Callable[..., Path]) -> Path:
    return _compile(made_once, "8da4w", quantize="8da4w", chunk=(32,))


@pytest.fixture(scope="session")
def hybrid_dir(made_once: Callable[..., Path]) -> Path:
    """A tiny Qwen3-Next in float32: layers that attend and layers with states. It has no tokenizer."""

    def make(folder: Path) -> None:
        import architectures
        import doubleweave
        from doubleweave.sources.hugging_face import from_module

        model = from_module(architectures.tiny_model("qwen3_next"), "hybrid", None)
        doubleweave.compile_llm(model, folder, quantize="none", max_context=256, chunk=(32,))

    return made_once("hybrid", make)


@pytest.fixture
def toy_copy(toy_program_dir: Path, tmp_path: Path) -> Path:
    """A copy of the toy program to damage."""
    import shutil

    return Path(shutil.copytree(toy_program_dir, tmp_path / "program"))


@pytest.fixture(scope="session")
def toy_program(toy_program_dir: Path) -> Any:
    import doubleweave

    return doubleweave.open(toy_program_dir)


@pytest.fixture(scope="session")
def toy_static_program(toy_static_dir: Path) -> Any:
    import doubleweave

    return doubleweave.open(toy_static_dir)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    from doubleweave.cli.main import main

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as error:
            code = int(error.code or 0)
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture
def refused(cli: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that must fail: exit code 2, one line on stderr, no traceback. Returns the line."""

    def run(*argv: object) -> str:
        code, out, err = cli(*argv)
        assert code == 2, err
        assert "Traceback" not in out + err
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1, err
        assert lines[0].startswith("doubleweave: ")
        return lines[0]

    return run
