"""A damaged program folder is refused in one sentence, or gives what the whole one gives: never a traceback, a crash, a
hang or another answer.

NUM_DAMAGES says how many damages each test tries (a tenth where each takes a process), DAMAGE_SEED which.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import doubleweave as dw
from doubleweave.errors import DoubleweaveError, ProgramError
from doubleweave.ir import manifest
from doubleweave.ir.manifest import MANIFEST_FILE, PROGRAM_FILE, RUN_FILE, TOKENIZER_FILE
from doubleweave.ir.seal import chunk_digests, sealed
from mutations import damaged, other_json, with_double_keys
from native_runner import RUNNER, needs_runner

NUM = int(os.environ.get("NUM_DAMAGES", "300"))
SEED = int(os.environ.get("DAMAGE_SEED", "0"))


def check_one_line(error: DoubleweaveError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


@pytest.fixture
def dice():
    return random.Random(SEED)


def test_the_package_reads_damaged_bytes(toy_copy, dice):
    path = toy_copy / MANIFEST_FILE
    content, whole = path.read_bytes(), manifest.read(toy_copy)
    for _ in range(NUM):
        path.write_bytes(damaged(content, dice))
        try:
            assert manifest.read(toy_copy) == whole
        except ProgramError as error:
            check_one_line(error)


def test_the_package_opens_a_manifest_whose_seal_fits(toy_copy, dice):
    """What the seal cannot find: the rules of the manifest keep what is read from it from failing later."""
    path = toy_copy / MANIFEST_FILE
    data = json.loads(path.read_bytes())
    del data["seal"]
    for number in range(NUM):
        other = other_json(data, dice)
        content = sealed(other) if isinstance(other, dict) else b"[]"
        if number % 10 == 0:
            content = with_double_keys(data, dice).encode()
        path.write_bytes(content)
        try:
            found = dw.open(toy_copy)
            found.generate([1, 2, 3], 2) if isinstance(found, dw.Program) else str(found)
        except DoubleweaveError as error:
            check_one_line(error)
        except BaseException:
            print(content.decode(errors="replace"))
            raise


def run(folder: Path, *argv: object) -> subprocess.CompletedProcess[bytes]:
    command = [*RUNNER, str(folder), *map(str, argv), "-n", "2", "--threads", "1"]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def check_runner(folder: Path, argv: list[object], whole: bytes) -> None:
    done = run(folder, *argv)
    if done.returncode == 0:
        assert done.stdout.splitlines()[0] == whole
    else:
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1, done.stderr


@needs_runner
@pytest.mark.parametrize("name", [PROGRAM_FILE, RUN_FILE, TOKENIZER_FILE, MANIFEST_FILE])
def test_doubleweave_run_reads_damaged_bytes(toy_copy, toy_8da4w_dir, dice, name):
    shutil.copytree(toy_8da4w_dir, toy_copy, dirs_exist_ok=True)
    whole = run(toy_copy, "-p", "hi").stdout.splitlines()[0]
    content = (toy_copy / name).read_bytes()
    for _ in range(NUM // 10):
        (toy_copy / name).write_bytes(damaged(content, dice))
        check_runner(toy_copy, ["-p", "hi"], whole)


@needs_runner
def test_doubleweave_run_reads_a_run_file_whose_seal_fits(toy_copy, dice):
    path = toy_copy / RUN_FILE
    data = json.loads(path.read_bytes())
    del data["seal"]
    for _ in range(NUM // 10):
        other = other_json(data, dice)
        path.write_bytes(sealed(other))
        done = run(toy_copy, "-p", "hi")
        assert done.returncode in (0, 2), (done, path.read_text())
        assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, done.stderr


def test_digests_are_those_of_xxh64(toy_copy):
    """The examples of XXH64's specification and of its reference implementation."""
    from doubleweave import _scheduling

    assert _scheduling.digest(b"") == "ef46db3751d8e999"
    assert _scheduling.digest(b"a") == "d24ec4f1a98c6e5b"
    assert _scheduling.digest(b"abc") == "44bc2cf5ad770999"
    assert _scheduling.digest(b"Nobody inspects the spammish repetition") == "fbcea83c8a378bf1"
    path = toy_copy / "long"
    path.write_bytes(bytes(2**20) + b"abc")
    assert chunk_digests(path) == [_scheduling.digest(bytes(2**20)), "44bc2cf5ad770999"]
