"""Packed weights in files: written at the first opening, mapped at the next, and never used when they were changed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import doubleweave
from doubleweave.runtime import packed_weights
from doubleweave.runtime.packed_weights import kept, make_room

PROMPT = list(range(1, 12))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, for programs of any size."""
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed_weights, "LEAST_BYTES", 0)
    monkeypatch.setattr(packed_weights, "_LEAST_OF_A_METHOD", 4096)
    return tmp_path / "cache" / "packed"


@pytest.fixture(params=["8da8w", "8da4w", "none"])
def program(request):
    name = {"none": "toy_program_dir"}.get(request.param, f"toy_{request.param}_dir")
    return request.getfixturevalue(name)


def logits(folder, **options):
    session = doubleweave.open(folder, **options).session()
    return np.stack([session.append(PROMPT), session.append([3])])


def states(cache):
    """By name, when each packed file was written and where it lies."""
    found = {}
    for path in sorted(cache.glob("*/*")):
        if not path.suffix:
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def packed_file(cache, method="block_1"):
    (path,) = cache.glob(f"*/{method}")
    return path


def test_the_second_opening_maps_what_the_first_wrote(program, cache):
    wanted = logits(program, keeps_packed=False)
    assert not cache.exists()
    assert np.array_equal(logits(program), wanted)
    written = states(cache)
    assert {"block_0", "block_1", "lm_head"} <= set(written)
    assert np.array_equal(logits(program), wanted)
    assert states(cache) == written


MAPS = """
import sys
import doubleweave
from doubleweave.runtime import packed_weights
packed_weights.LEAST_BYTES, packed_weights._LEAST_OF_A_METHOD = 0, 4096
session = doubleweave.open(sys.argv[1]).session()
session.append(list(range(1, 12)))
print(sum("/packed/" in line for line in open("/proc/self/maps")), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["plain", "linked"])
def test_processes_share_them(toy_8da8w_dir, cache, tmp_path, monkeypatch, way):
    """Also while the one that wrote them runs: XNNPACK's lock on a file would keep the others from it."""
    if way == "linked":
        cache.parent.mkdir()
        (tmp_path / "link").symlink_to(cache.parent)
        monkeypatch.setenv("DOUBLEWEAVE_CACHE", str(tmp_path / "link"))
    command = [sys.executable, "-c", MAPS, str(toy_8da8w_dir)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = []
    try:
        mapped = []
        for _ in range(3):
            running.append(subprocess.Popen(command, **options))
            mapped.append(int(running[-1].stdout.readline()))
        assert min(mapped[1:]) == mapped[1] == len(states(cache))
    finally:
        for process in running:
            process.communicate()


@pytest.mark.parametrize("change", ["flipped", "cut", "foreign", "empty", "no note", "other note"])
def test_what_was_changed_is_not_used(toy_8da8w_dir, cache, change):
    wanted = logits(toy_8da8w_dir)
    path = packed_file(cache)
    data = bytearray(path.read_bytes())
    note = path.with_suffix(".json")
    if change == "no note":  # a process that was killed before the end
        note.unlink()
    elif change == "other note":
        note.write_text(json.dumps([1, 2, 3, 4, 5]))
    else:
        data[100] ^= 0xFF
        new = {"flipped": data, "cut": data[:-50], "foreign": b"another file" * 100, "empty": b""}[change]
        path.chmod(0o644)
        path.write_bytes(new)
    before = states(cache)
    assert np.array_equal(logits(toy_8da8w_dir), wanted)
    after = states(cache)
    assert [name for name in before if before[name] != after[name]] == ["block_1"]
    assert np.array_equal(logits(toy_8da8w_dir), wanted)
    assert states(cache) == after


def test_what_another_process_writes_is_left_to_it(toy_8da8w_dir, cache):
    wanted = logits(toy_8da8w_dir)
    path = packed_file(cache)
    path.with_suffix(".json").unlink()
    with open(path.with_suffix(".lock"), "r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = states(cache)
        assert np.array_equal(logits(toy_8da8w_dir), wanted)
        assert states(cache) == before
        assert not path.with_suffix(".json").exists()


def test_a_program_runs_on_when_they_are_removed(toy_8da8w_dir, cache):
    wanted = logits(toy_8da8w_dir)
    session = doubleweave.open(toy_8da8w_dir).session()
    first = session.append(PROMPT)
    assert [each.name for each in kept()] == ["toy"]
    assert make_room(most=0) > 10_000
    assert not list(cache.iterdir())
    assert np.array_equal(np.stack([first, session.append([3])]), wanted)


def test_the_longest_unused_go_first(toy_8da8w_dir, toy_8da4w_dir, cache):
    logits(toy_8da8w_dir)
    logits(toy_8da4w_dir)
    old, new = kept()
    os.utime(old.folder, (1, 1))
    logits(toy_8da8w_dir)  # used: now it is the newer one
    assert [each.folder for each in kept()] == [new.folder, old.folder]
    make_room(most=old.num_bytes)
    assert [each.folder for each in kept()] == [old.folder]


@pytest.mark.parametrize("problem", ["off", "a file", "long"])
def test_without_a_cache(toy_8da8w_dir, cache, tmp_path, monkeypatch, problem):
    (tmp_path / "file").write_text("in the way")
    value = {"off": "off", "a file": str(tmp_path / "file"), "long": str(tmp_path / ("x" * 240))}[problem]
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", value)
    wanted = logits(toy_8da8w_dir, keeps_packed=False)
    assert np.array_equal(logits(toy_8da8w_dir), wanted)
    assert not list(tmp_path.glob("**/block_*"))


def test_a_full_disk_keeps_none(toy_8da8w_dir, cache, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for _ in range(2):
        logits(toy_8da8w_dir)
    assert not states(cache)


def test_methods_of_one_module_have_notes_of_their_own(cache):
    """An encoder's methods are named "vision.fc1", "vision.fc2"."""
    cache.mkdir(parents=True)
    names = {"vision.fc1", "vision.fc2"}
    packed = packed_weights.PackedWeights(cache, names)
    for name in sorted(names):
        with packed.path_of(name) as path:
            Path(path).write_text(name)
    for name in names:
        with packed.path_of(name) as path:
            assert Path(path).read_text() == name


def test_small_programs_keep_none(toy_8da8w_dir, cache, monkeypatch):
    monkeypatch.setattr(packed_weights, "LEAST_BYTES", 256 << 20)
    logits(toy_8da8w_dir)
    assert not Path(cache).exists()


def test_the_command(toy_8da8w_dir, cache, capsys):
    from doubleweave.cli.main import main

    logits(toy_8da8w_dir)
    main(["cache", "--json"])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["name"] for each in report["programs"]] == ["toy"]
    main(["cache", "--clear"])
    assert capsys.readouterr().out.startswith("removed ")
    assert not states(cache)
