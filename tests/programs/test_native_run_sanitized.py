"""doubleweave-run under the address and undefined-behaviour sanitizers: the tests of the plain one, once more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.executorch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner(third_party):
    build = ROOT / "build" / "sanitized"
    bin = Path(sys.executable).parent
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    configure = [
        *(bin / "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={bin / 'ninja'}"),
        *(
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DDOUBLEWEAVE_BUILD_PYTHON=OFF",
            f"-DCMAKE_CXX_FLAGS={flags}",
        ),
        *("-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DDOUBLEWEAVE_THIRD_PARTY={third_party}"),
    ]
    for command in (configure, [bin / "cmake", "--build", build, "--target", "doubleweave-run"]):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        if "doubleweave-run is left out" in done.stderr:
            pytest.skip("doubleweave-run cannot be built: its sources of PCRE2 and JSON cannot be fetched")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return build / "doubleweave-run"


def test_everything_it_can_do(runner):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            ROOT / "tests" / "programs" / "test_native_run.py",
        ],
        env={**os.environ, "DOUBLEWEAVE_RUN": str(runner)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
