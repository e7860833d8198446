"""Files whose SHA-256 was computed before are known again, until somebody writes them."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from doubleweave.errors import ProgramError
from doubleweave.ir import known_files, manifest


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A file that was written a while ago, its digest, and how often it was hashed."""
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_files, "LEAST_BYTES", 1)
    monkeypatch.setattr(known_files, "_TICK_NS", 0)
    path = tmp_path / "program.pte"
    path.write_bytes(b"weights" * 1000)
    hashed = []
    whole = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: hashed.append(path) or whole(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), hashed


def test_it_is_hashed_once(program):
    path, digest, hashed = program
    for _ in range(3):
        manifest._check_file(path, digest)
    assert len(hashed) == 1
    manifest._check_file(path, digest, verify=True)
    assert len(hashed) == 2


@pytest.mark.parametrize("change", ["written", "renamed over", "old time"])
def test_what_was_written_since_is_hashed_again(program, change):
    path, digest, hashed = program
    manifest._check_file(path, digest)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    before = path.stat()
    if change == "renamed over":
        (path.parent / "other").write_bytes(data)
        (path.parent / "other").replace(path)
    else:
        path.write_bytes(data)
    if change == "old time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ProgramError, match="its SHA-256 is"):
        manifest._check_file(path, digest)
    assert len(hashed) == 2


def test_a_fresh_file_is_not_noted(program, monkeypatch):
    """What is written a moment later may have the same time."""
    path, digest, hashed = program
    monkeypatch.setattr(known_files, "_TICK_NS", 2_000_000_000)
    manifest._check_file(path, digest)
    manifest._check_file(path, digest)
    assert len(hashed) == 2
    monkeypatch.setattr(time, "time_ns", lambda: path.stat().st_ctime_ns + 3_000_000_000)
    manifest._check_file(path, digest)
    manifest._check_file(path, digest)
    assert len(hashed) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "[1, 2]", '{"a": 1}', "null"])
def test_a_record_that_is_damaged(program, tmp_path, content):
    path, digest, hashed = program
    manifest._check_file(path, digest)
    (record,) = (tmp_path / "cache" / "known").iterdir()
    record.write_text(content)
    manifest._check_file(path, digest)
    assert len(hashed) == 2


@pytest.mark.parametrize("value", ["off", "/dev/null/cache"])
def test_without_a_cache(program, monkeypatch, value):
    path, digest, hashed = program
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", value)
    manifest._check_file(path, digest)
    manifest._check_file(path, digest)
    assert len(hashed) == 2


def test_forgotten(program):
    path, digest, hashed = program
    manifest._check_file(path, digest)
    known_files.forget_all()
    manifest._check_file(path, digest)
    assert len(hashed) == 2
