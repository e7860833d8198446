"""Programs of more than 2 and 4 GiB: a toy whose data lie on both sides of these borders, with holes between.

The holes take no room on the disk, and reading them gives zeros.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import doubleweave
import toys
from doubleweave import _scheduling
from doubleweave.ir import known_files, manifest
from native_runner import needs_runner, report

MIB = 1 << 20
BORDERS = (2 << 30, 4 << 30)
SHA256 = "0" * 64
PROMPT = list(range(1, 40))


@pytest.fixture(scope="module")
def folder(made_once):
    """The toy in 8da8w, written with holes: a weight of more than a page lies across each border.

    Nothing here reads the holes, which takes seconds: the file's SHA-256 is made up, and known (`cache`), and the
    digest of a mebibyte of zeros is worked out once."""
    from doubleweave.compiler.lower import pte_file
    from doubleweave.predict import run_file

    write = pte_file.ProgramWriter._write
    across = {1: BORDERS[0], 3: BORDERS[1]}  # by the number of the large piece
    written = []

    def with_holes(self, piece, blocks):
        if self._sizes[piece] > 4096:
            if border := across.get(len(written)):
                self._end = border - self._base - 2048
            written.append(piece)
        write(self, piece, blocks)

    def make(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pte_file.ProgramWriter, "_write", with_holes)
            for module in (pte_file, manifest):
                patch.setattr(module, "sha256_of", lambda path: SHA256)
            patch.setattr(run_file, "chunk_digests", digests)
            doubleweave.compile_llm(toys.model(), out, quantize="8da8w", chunk=(32,))
        assert len(written) > max(across)

    return made_once("large_file", make)


def digests(path):
    """What chunk_digests gives."""
    found = []
    zeros = _scheduling.digest(bytes(MIB))
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        for start in range(0, size, MIB):
            try:
                is_hole = os.lseek(file.fileno(), start, os.SEEK_DATA) >= start + MIB
            except OSError:  # up to the end
                is_hole = size >= start + MIB
            file.seek(start)
            found.append(zeros if is_hole else _scheduling.digest(file.read(MIB)))
    return found


@pytest.fixture(autouse=True)
def cache(folder, tmp_path, monkeypatch):
    """The file is one that was hashed before."""
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_files, "_TICK_NS", 0)
    known_files.note(folder / "program.pte", SHA256)


def test_its_data_lie_on_both_sides(folder):
    from executorch.exir._serialize._program import _ExtendedHeader

    path = folder / "program.pte"
    size = path.stat().st_size
    assert size > BORDERS[1]
    assert manifest._parse(folder / "manifest.json").program_bytes == size
    run_file = json.loads((folder / "run.json").read_text())
    assert (run_file["program_bytes"], len(run_file["program_digests"])) == (size, -(-size // MIB))
    with open(path, "rb") as file:
        header = _ExtendedHeader.from_bytes(file.read(64)[8:])
    assert header.segment_base_offset + header.segment_data_size == size


def test_it_runs_as_the_small_one(folder, toy_8da8w_dir):
    found, expected = (doubleweave.open(each).session().append(PROMPT) for each in (folder, toy_8da8w_dir))
    assert np.array_equal(found, expected)


@needs_runner
def test_it_runs_without_python(folder, toy_8da8w_dir, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(PROMPT))
    found, expected = (
        report(each, "--token-ids", ids, "-n", 5)["token_ids"] for each in (folder, toy_8da8w_dir)
    )
    assert found == expected
