"""A damaged program folder is refused in one sentence, or gives what the whole one gives: never a traceback, a crash, a
hang or another answer.

NUM_DAMAGES says how many damages each test tries (a part of it where each takes long), DAMAGE_SEED which. Damaged
programs are opened in processes of their own (damage_batch.py): a crash would end the other tests as well.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import damage_batch
import doubleweave as dw
from damage_batch import check_one_line
from doubleweave.errors import ProgramError
from doubleweave.ir import manifest
from doubleweave.ir.manifest import MANIFEST_FILE, PROGRAM_FILE, RUN_FILE, TOKENIZER_FILE
from doubleweave.ir.seal import chunk_digests, sealed
from doubleweave.predict.estimate import Device
from doubleweave.predict.find_profile import PROFILE_FILE, program_id, this_machine
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.planner import decisions
from doubleweave.predict.profile import Measured, Profile
from doubleweave.predict.profile_file import write_profile
from mutations import damaged, other_json
from native_runner import RUNNER, fit_digests, needs_runner

NUM = int(os.environ.get("NUM_DAMAGES", "300"))
SEED = int(os.environ.get("DAMAGE_SEED", "0"))


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


@pytest.fixture(scope="session")
def called_dir(made_once):
    """A module with states, dims, chunks of fixed sizes, a table, and arguments and results in containers."""
    import torch
    from torch.export import Dim

    from doubleweave import Dynamic, Static

    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x):
            self.n += 1
            return x + self.n

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.counter, self.fc = Counter(), torch.nn.Linear(4, 4)
            self.table = torch.nn.Embedding(5, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x, named):
            self.calls += 1
            rows = self.counter(self.counter(self.fc(x)))
            return {"rows": rows + self.calls, "pair": (self.table(named["index"]), torch.cat([x, x]))}

    def make(out):
        torch.manual_seed(0)
        dw.compile(
            Net(),
            (torch.ones(9, 4), {"index": torch.tensor([1, 0, 2])}),
            dynamic_shapes={
                "x": {0: Dim("T", min=1, max=64)},
                "named": {"index": {0: Dim("k", min=1, max=8)}},
            },
            policy={"counter": Dynamic(), "fc": Static(device="npu", sizes=(1, 4), chunk={"input": 0})},
            out=out,
        )

    return made_once("called", make)


@pytest.fixture(scope="session")
def profiled_dir(toy_program_dir, made_once):
    """The toy with a profile of this machine: measured but for attention, which is estimated by its device."""

    def make(folder):
        shutil.copytree(toy_program_dir, folder)
        program = dw.open(folder)
        split, most = program.split, program.model.max_context
        table = Measured((1, 32), (0, 64), ((20.0, 30.0), (90.0, 99.0)), (0.1, 0.1), (0.0, 0.0), (1.0, 0.9))
        profile = Profile(
            name="made up",
            kind="measured",
            devices={"cpu": Device(5.0, 5.0, 40.0, {"float32": 50.0}, 0.9, 2)},
            segments={s.name: {1: table, 2: table} for s in split.segments if s.name != "attention"},
            hand_over_us={("cpu", "cpu"): 1.5},
            contention={2: {("cpu", "cpu"): 0.2}},
            same_worker_us=0.5,
            machine=this_machine(),
            program=program_id(split),
            threads=1,
        )
        chosen = decisions(RunPlanner(split, profile, most), 1, most)
        write_profile(replace(profile, decisions=chosen), folder / PROFILE_FILE)

    return made_once("profiled", make)


# In a process, and so many damages of each for one that NUM_DAMAGES asks for.
BATCH = 2000
CASES = [
    ("bytes", "generate", "profiled_dir", 1 / 3),
    ("bytes", "generate", "hybrid_dir", 1 / 6),
    ("manifest", "generate", "profiled_dir", 1 / 2),
    ("manifest", "generate", "hybrid_dir", 1 / 6),
    ("tokenizer", "generate", "toy_program_dir", 1 / 3),
    ("profile", "generate", "profiled_dir", 1 / 3),
    ("bytes", "call", "called_dir", 1 / 3),
    ("manifest", "call", "called_dir", 1 / 2),
    ("bytes", "commands", "profiled_dir", 1 / 20),
    ("manifest", "commands", "profiled_dir", 1 / 20),
    ("manifest", "commands", "called_dir", 1 / 20),
    ("profile", "commands", "profiled_dir", 1 / 20),
]


@pytest.mark.parametrize(
    ("damage", "use", "folder", "part"), CASES, ids=["-".join(map(str, case[:3])) for case in CASES]
)
def test_damages_in_a_process_of_their_own(request, tmp_path, damage, use, folder, part):
    whole, count = request.getfixturevalue(folder), max(1, int(NUM * part))
    for first in range(0, count, BATCH):
        argv = [damage, use, whole, first, min(BATCH, count - first), SEED]
        done = subprocess.run(
            [sys.executable, Path(damage_batch.__file__), *map(str, argv)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        last = "\n".join(done.stdout.splitlines()[-2:])
        assert done.returncode == 0, (
            f"exit code {done.returncode} after number {last}:\n{done.stderr[-6000:]}"
        )


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
def test_doubleweave_run_reads_a_tokenizer_whose_digest_fits(toy_copy, dice):
    content = json.loads((toy_copy / TOKENIZER_FILE).read_bytes())
    for _ in range(NUM // 10):
        (toy_copy / TOKENIZER_FILE).write_text(json.dumps(other_json(content, dice)))
        fit_digests(toy_copy)
        done = run(toy_copy, "-p", "some <|end|> text é")
        assert done.returncode in (0, 2), done
        assert done.returncode == 0 or len(done.stderr.splitlines()) == 1, done.stderr


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
