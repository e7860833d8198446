"""doubleweave-run for aarch64 Linux: cross-compiled, its kernels and a small program run under qemu.

AARCH64=all tries all random shapes of attention, twelve times as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
# Compiled in two thirds of the time, and the kernels take as long.
OPTIONS = ("-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG", "-DCMAKE_C_FLAGS_RELEASE=-O1 -DNDEBUG")
# Without SME: XNNPACK's 8-bit kernels for it give wrong numbers under qemu 7.2, those for i8mm right ones.
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max,sme=off")


@pytest.fixture(scope="module")
def build(third_party):
    """The build folder; it stays between runs, so that only what changed is built again."""
    folder = ROOT / "build" / "aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # another worker may build it
        done = subprocess.run(
            [ROOT / "tests" / "build_aarch64", folder, *OPTIONS],
            env={**os.environ, "PYTHON": sys.executable, "THIRD_PARTY": third_party},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "build"


def run(*argv: object) -> str:
    done = subprocess.run([*QEMU, *map(str, argv)], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_attention_kernels_compute_the_same(build):
    part = 1 if os.environ.get("AARCH64") == "all" else 12
    out = run(build / "tests" / "cpp" / "test_attention", part)
    assert "neon" in out


@pytest.mark.parametrize(
    "name", ["test_linears", "test_memory", "test_rotary", "test_scheduling", "test_sha256", "test_tokenizer"]
)
def test_what_the_programs_are_made_of(build, name):
    assert ", 0 failed" in run(build / "tests" / "cpp" / name)


@pytest.mark.parametrize("recipe", ["float32", "8da8w"])
@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_the_same_tokens_as_on_this_machine(
    build, toy_program_dir, toy_8da8w_dir, tmp_path, recipe, schedule
):
    import doubleweave as dw

    folder = toy_program_dir if recipe == "float32" else toy_8da8w_dir
    ids = [number % 250 for number in range(7, 7 + 77 * 13, 13)]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    out = run(
        *(build / "doubleweave-run", folder, "--token-ids", tmp_path / "ids.json", "-n", 12),
        *("--schedule", schedule, "--json"),
    )
    found = json.loads(out.splitlines()[-1])["token_ids"]
    assert tuple(found) == dw.open(folder).generate(ids, max_new_tokens=12).token_ids


def test_it_is_for_aarch64_and_links_no_python(build):
    header = subprocess.run(
        ["readelf", "-hd", build / "doubleweave-run"], capture_output=True, text=True, check=True
    ).stdout
    assert "AArch64" in header
    assert "libpython" not in header
