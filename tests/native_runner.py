"""Calls of doubleweave-run, as its tests make them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from doubleweave.ir.seal import chunk_digests, digest_of, sealed

# Another build may be tested: one with sanitizers, or for another processor under an emulator.
RUNNER = os.environ.get("DOUBLEWEAVE_RUN", str(Path(sys.executable).parent / "doubleweave-run")).split()

needs_runner = pytest.mark.skipif(
    shutil.which(RUNNER[-1]) is None,
    reason="doubleweave-run was not built (its sources of PCRE2 and JSON could not be fetched)",
)


def native(*argv, code=0, **kwargs):
    done = subprocess.run(
        [*RUNNER, *map(str, argv)], capture_output=True, text=True, timeout=300, check=False, **kwargs
    )
    assert done.returncode == code, done.stderr
    return done


def report(*argv, **kwargs):
    return json.loads(native(*argv, "--json", **kwargs).stdout.splitlines()[-1])


def sentence(*argv, **kwargs):
    """What it refuses with: one line, exit code 2."""
    lines = native(*argv, code=2, **kwargs).stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("doubleweave-run: ")
    return lines[0]


def write_sealed(path, data, **changes):
    """Write a JSON file of a program folder with changes, under a seal that fits."""
    path.write_bytes(sealed({key: value for key, value in {**data, **changes}.items() if key != "seal"}))


def fit_digests(folder):
    """Write run.json for the program and the tokenizer that are in the folder now."""
    path, program = folder / "run.json", folder / "program.pte"
    data = json.loads(path.read_text())
    found = {"tokenizer_digest": digest_of(folder / "tokenizer.json")}
    if program.exists():
        found |= {"program_digests": chunk_digests(program), "program_bytes": program.stat().st_size}
    if any(data[key] != value for key, value in found.items()):
        write_sealed(path, data, **found)
