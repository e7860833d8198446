"""doubleweave-run under the address and undefined-behaviour sanitizers: the tests of the plain one, once more, and the
C++ tests of its tokenizer, memory and digest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [ROOT / "tests" / "programs" / f"test_native_{name}.py" for name in ("run", "tokenizer")]
CPP_TESTS = ("test_tokenizer", "test_memory", "test_sha256")


@pytest.fixture(scope="module")
def build(third_party):
    build = ROOT / "build" / "sanitized"
    bin = Path(sys.executable).parent
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
    configure = [
        *(bin / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={bin / 'ninja'}"),
        *(
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DDOUBLEWEAVE_BUILD_PYTHON=OFF",
            "-DDOUBLEWEAVE_BUILD_TESTS=ON",
            f"-DCMAKE_CXX_FLAGS={flags}",
        ),
        # Lines are all that reports need, and optimizing instrumented code takes longer than running it as it is.
        *("-DCMAKE_BUILD_TYPE=Sanitized", "-DCMAKE_CXX_FLAGS_SANITIZED=-O0 -g1 -DNDEBUG"),
        *("-DCMAKE_C_FLAGS_SANITIZED=-O1 -DNDEBUG", f"-DDOUBLEWEAVE_THIRD_PARTY={third_party}"),
    ]
    for command in (configure, [bin / "cmake", "--build", build, "--target", "doubleweave-run", *CPP_TESTS]):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if "doubleweave-run is left out" in done.stderr:
            pytest.skip("doubleweave-run cannot be built: its sources of PCRE2 and JSON cannot be fetched")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return build


@pytest.mark.parametrize("name", CPP_TESTS)
def test_what_it_is_made_of(build, name):
    done = subprocess.run([build / "tests" / "cpp" / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_everything_it_can_do(build, shared):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        env={**os.environ, "DOUBLEWEAVE_RUN": str(build / "doubleweave-run"), "SHARED_FOLDER": str(shared)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
