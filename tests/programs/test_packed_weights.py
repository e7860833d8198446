"""Packed weights in files: written at the first opening, mapped at the next, and never used when they were changed.

Python's run time and doubleweave-run have the same files, so both are the `way` that a program is run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import doubleweave
from doubleweave.ir import known_files, manifest
from doubleweave.predict.find_profile import find_profile
from doubleweave.predict.run_file import write_run_file
from doubleweave.runtime.packed_weights import kept, make_room
from native_runner import fit_digests, needs_runner, report, sentence, write_sealed

PROMPT = list(range(1, 12))
WAYS = ["python", pytest.param("runner", marks=needs_runner)]
MIB = 1 << 20


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own."""
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def copy_of(program, folder, segment_bytes=100 * MIB, padding=0):
    """The program, said to have so much weights in each segment that has 4 KiB, and so many more bytes of file."""
    shutil.copytree(program, folder)
    path = folder / "program.pte"
    os.truncate(path, path.stat().st_size + padding)
    found = manifest.read(program)
    segments = tuple(
        replace(each, weight_bytes=segment_bytes if each.weight_bytes >= 4096 else 0)
        for each in found.split.segments
    )
    changed = replace(
        found,
        split=replace(found.split, segments=segments),
        program_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        program_bytes=path.stat().st_size,
    )
    changed.write(folder)
    write_run_file(folder, changed, find_profile(folder, changed))
    return folder


@pytest.fixture
def large(toy_program_dir, tmp_path):
    return copy_of(toy_program_dir, tmp_path / "program")


@pytest.fixture
def ids_file(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(PROMPT))
    return path


@pytest.fixture
def tokens(ids_file):
    """What a program says behind the prompt."""

    def run(folder, way="python", **options):
        if way == "runner":
            return report(folder, "--token-ids", ids_file, "-n", 4)["token_ids"]
        return list(doubleweave.open(folder, **options).generate(PROMPT, max_new_tokens=4).token_ids)

    return run


def logits(folder, **options):
    session = doubleweave.open(folder, **options).session()
    return np.stack([session.append(PROMPT), session.append([3])])


def states(cache):
    """By name, when each packed file was written and where it lies."""
    found = {}
    for path in sorted(cache.glob("*/*")):
        if not path.suffix and " " not in path.name:
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def packed_file(cache, method="block_1"):
    (path,) = cache.glob(f"*/{method}")
    return path


def beside(path, kind):
    return path.with_name(f"{path.name} {kind}")


def test_the_second_opening_maps_what_the_first_wrote(large, cache):
    wanted = logits(large, keeps_packed=False)
    assert not cache.exists()
    assert np.array_equal(logits(large), wanted)
    written = states(cache)
    assert {"block_0", "block_1", "lm_head"} <= set(written)
    assert np.array_equal(logits(large), wanted)
    assert states(cache) == written


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_quantized_weights_lie_in_the_file_as_they_are_read(recipe, request, cache, tmp_path):
    program = copy_of(request.getfixturevalue(f"toy_{recipe}_dir"), tmp_path / "program")
    wanted = logits(program, keeps_packed=False)
    assert np.array_equal(logits(program), wanted)
    assert np.array_equal(logits(program), wanted)
    assert "lm_head" not in states(cache)
    assert sum(path.stat().st_size for path in cache.glob("*/*")) < 16384  # what else norms have


@needs_runner
@pytest.mark.parametrize(
    ("first", "second"), [("python", "runner"), ("runner", "python"), ("runner", "runner")]
)
def test_what_one_wrote_the_other_maps(large, cache, tokens, first, second):
    wanted = tokens(large, keeps_packed=False)
    assert tokens(large, first) == wanted
    written = states(cache)
    assert {"block_0", "block_1", "lm_head"} <= set(written)
    before = contents(cache)
    assert tokens(large, second) == wanted
    assert states(cache) == written
    assert contents(cache) == before


def contents(cache):
    return {path.name: path.read_bytes() for path in cache.glob("*/*")}


MAPS = """
import sys
import doubleweave
session = doubleweave.open(sys.argv[1]).session()
session.append(list(range(1, 12)))
print(sum("/packed/" in line for line in open("/proc/self/maps")), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["plain", "linked"])
def test_processes_share_them(large, cache, tmp_path, monkeypatch, way):
    """Also while the one that wrote them runs: XNNPACK's lock on a file would keep the others from it."""
    if way == "linked":
        cache.parent.mkdir()
        (tmp_path / "link").symlink_to(cache.parent)
        monkeypatch.setenv("DOUBLEWEAVE_CACHE", str(tmp_path / "link"))
    running = []
    try:
        mapped = []
        for _ in range(3):
            running.append(started(large))
            mapped.append(int(running[-1].stdout.readline()))
        assert min(mapped[1:]) == mapped[1] == len(states(cache))
    finally:
        for process in running:
            process.communicate()


def test_what_another_process_has_just_written_is_not_written_again(large, cache, tokens):
    """It looks at a file that is not whole yet, and takes the lock when the other has let go of it."""
    tokens(large)
    before, note = states(cache), beside(packed_file(cache), "whole")
    written = note.rename(note.with_name("aside"))
    os.mkfifo(note)  # where it looks, it waits for us
    process = started(large)
    try:
        looking = opened_for_writing(note, process)
        written.replace(note)
        os.write(looking, b"not yet")
        os.close(looking)
        process.stdout.readline()
    finally:
        process.communicate()
    assert states(cache) == before


def opened_for_writing(fifo, process):
    """The end that is written to, when the process has opened the other."""
    while process.poll() is None:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.01)
    raise AssertionError("the process has ended")


def started(folder):
    return subprocess.Popen(
        [sys.executable, "-c", MAPS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", ["flipped", "cut", "foreign", "empty", "no note", "other note"])
def test_what_was_changed_is_not_used(large, cache, tokens, change, way):
    wanted = tokens(large)
    path = packed_file(cache)
    data = bytearray(path.read_bytes())
    note = beside(path, "whole")
    if change == "no note":  # a process that was killed before the end
        note.unlink()
    elif change == "other note":
        note.write_text("1\n2\n3\n4\n5\n")
    else:
        data[100] ^= 0xFF
        new = {"flipped": data, "cut": data[:-50], "foreign": b"another file" * 100, "empty": b""}[change]
        path.chmod(0o644)
        path.write_bytes(new)
    before = states(cache)
    assert tokens(large, way) == wanted
    after = states(cache)
    assert [name for name in before if before[name] != after[name]] == ["block_1"]
    assert tokens(large, way) == wanted
    assert states(cache) == after


@pytest.mark.parametrize("way", WAYS)
def test_what_another_process_writes_is_left_to_it(large, cache, tokens, way):
    wanted = tokens(large)
    path = packed_file(cache)
    beside(path, "whole").unlink()
    with open(beside(path, "lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = states(cache)
        assert tokens(large, way) == wanted
        assert states(cache) == before
        assert not beside(path, "whole").exists()


@needs_runner
def test_a_program_that_was_changed_does_not_use_them(
    large, toy_8da8w_dir, cache, tokens, ids_file, tmp_path
):
    """Its weights in the file are not read where they are mapped, so that no digest of them would be compared."""
    tokens(large, "runner")
    path = large / "program.pte"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fit_digests(large)  # in a large program other mebibytes than this one would be read
    assert "program.pte: its SHA-256 is " in sentence(large, "--token-ids", ids_file)
    (tmp_path / "other").mkdir()
    other = copy_of(toy_8da8w_dir, tmp_path / "other" / "program", padding=1)
    tokens(other, "runner")
    assert len(list(cache.iterdir())) == 2


@needs_runner
def test_a_file_is_hashed_by_either_once(toy_8da8w_dir, cache, tokens, ids_file, tmp_path, monkeypatch):
    """A large file whose digest either has found is known to the other, by size, times and place alone."""
    folder = copy_of(toy_8da8w_dir, tmp_path / "program", padding=70 * MIB)
    path = folder / "program.pte"
    old = path.stat().st_mtime_ns - 10**10
    found = manifest.read(folder)
    record = cache.parent / "known" / f"{found.program_sha256}.json"
    wait_for_ctime(path)
    record.unlink(missing_ok=True)
    tokens(folder, "runner")
    assert known_files.is_known(path, found.program_sha256)
    state = json.loads(record.read_text())
    # The other way round: what Python noted is what the runner goes by, whatever the file has.
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(old, old))
    assert "its SHA-256 is" in sentence(folder, "--token-ids", ids_file)
    record.write_text(json.dumps([known_files.state_of(path), *state]))
    tokens(folder, "runner")


def wait_for_ctime(path):
    while time.time_ns() - path.stat().st_ctime_ns < 2_100_000_000:
        time.sleep(0.1)


def test_a_program_runs_on_when_they_are_removed(large, cache):
    wanted = logits(large)
    session = doubleweave.open(large).session()
    first = session.append(PROMPT)
    assert [each.name for each in kept()] == ["toy"]
    assert make_room(0) > 10_000
    assert not list(cache.iterdir())
    assert np.array_equal(np.stack([first, session.append([3])]), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_the_longest_unused_go_first(large, toy_8da4w_dir, cache, tokens, tmp_path, way):
    (tmp_path / "other").mkdir()
    tokens(large)
    tokens(copy_of(toy_8da4w_dir, tmp_path / "other" / "program"))
    old, new = kept()
    os.utime(old.folder, (1, 1))
    tokens(large, way)  # used: now it is the newer one
    assert [each.folder for each in kept()] == [new.folder, old.folder]
    make_room(old.num_bytes)
    assert [each.folder for each in kept()] == [old.folder]


@pytest.mark.parametrize("way", WAYS)
def test_room_is_made_before_more_is_kept(large, cache, tokens, way):
    old = cache / "another program"
    old.mkdir(parents=True)
    (old / "block_0").touch()
    os.truncate(old / "block_0", (16 << 30) - 400 * MIB)  # a hole, which takes no room
    tokens(large, way)
    assert not old.exists()
    assert states(cache)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("problem", ["off", "a file", "long"])
def test_without_a_cache(large, cache, tokens, tmp_path, monkeypatch, problem, way):
    (tmp_path / "file").write_text("in the way")
    value = {"off": "off", "a file": str(tmp_path / "file"), "long": str(tmp_path / ("x" * 240))}[problem]
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", value)
    wanted = tokens(large, keeps_packed=False)
    assert tokens(large, way) == wanted
    assert not list(tmp_path.glob("**/block_*"))


@pytest.mark.parametrize("way", WAYS)
def test_the_users_cache_folder(large, tokens, tmp_path, monkeypatch, way):
    monkeypatch.setenv("DOUBLEWEAVE_CACHE", "")
    for variable, folder in (("HOME", ".cache"), ("XDG_CACHE_HOME", "")):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        tokens(large, way)
        assert states(tmp_path / variable / folder / "doubleweave" / "packed")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [20, 17 << 10])
def test_small_programs_and_what_is_more_than_all_of_it(toy_8da8w_dir, cache, tokens, tmp_path, size, way):
    """In MiB a segment."""
    tokens(copy_of(toy_8da8w_dir, tmp_path / "program", size * MIB), way)
    assert not states(cache)


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_keeps_none(toy_8da8w_dir, tokens, tmp_path, monkeypatch, way):
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 1 << 60
    if not free < 30 << 30:
        pytest.skip("no disk here is so small that half of it is less than the cache takes")
    folder = copy_of(toy_8da8w_dir, tmp_path / "program", max(free // 8, 100 * MIB))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as cache:
        monkeypatch.setenv("DOUBLEWEAVE_CACHE", cache)
        for _ in range(2):
            tokens(folder, way)
        assert not states(Path(cache) / "packed")


@needs_runner
def test_methods_of_the_run_file_stay_in_the_folder(large, cache, ids_file):
    """Names in run.json become names of files."""
    path = large / "run.json"
    data = json.loads(path.read_text())
    for segment in data["segments"]:
        segment["name"] = "../" + segment["name"]
    for call in data["calls"]:
        call["segment"] = "../" + call["segment"]
    write_sealed(path, data)
    assert "has no method '../" in sentence(large, "--token-ids", ids_file)
    assert not list(cache.glob("*lock"))


def test_the_command(large, cache, capsys):
    from doubleweave.cli.main import main

    logits(large)
    main(["cache", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["name"] for each in found["programs"]] == ["toy"]
    main(["cache", "--clear"])
    assert capsys.readouterr().out.startswith("removed ")
    assert not states(cache)
