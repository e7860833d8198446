"""Hidden folders are gone at the end, or removed by who comes next; never while somebody is in them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubleweave.compiler.hidden_folders import aside, hidden_folder, remove_abandoned

# Is in a hidden folder, or has let the target step aside, until it is killed.
STAYS = """
import sys, time
from pathlib import Path
from doubleweave.compiler import hidden_folders
with getattr(hidden_folders, sys.argv[1])(Path(sys.argv[2])) as path:
    (path / "data").touch()
    print(path, flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def started():
    """Starts a process that stays in a folder; returns it and the folder's path."""
    processes = []

    def start(function: str, target: Path):
        process = subprocess.Popen(
            [sys.executable, "-c", STAYS, function, str(target)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def killed(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_it_is_gone_at_the_end_and_on_an_error(tmp_path):
    with hidden_folder(tmp_path / "out") as path:
        (path / "data").touch()
        assert (path.parent, path.name[:5]) == (tmp_path, ".out.")
    with pytest.raises(KeyError), hidden_folder(tmp_path / "out"):
        raise KeyError
    assert not names(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path, started):
    process, path = started("hidden_folder", tmp_path / "out")
    remove_abandoned(tmp_path / "out")
    assert names(path) == {"data"}  # somebody is in it
    killed(process)
    assert names(path) == {"data"}
    remove_abandoned(tmp_path / "out")
    assert not names(tmp_path)


def test_folders_of_others_stay(tmp_path):
    others = {".out.backup01", ".out2.doubleweave-new-abcdefgh", ".outdoubleweave-new-abcdefgh", "out"}
    for name in others:
        (tmp_path / name).mkdir()
    remove_abandoned(tmp_path / "out")
    remove_abandoned(tmp_path / "nothing" / "out")
    assert names(tmp_path) == others


def test_a_target_comes_back_on_an_error(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "data").touch()

    def fail() -> None:
        with aside(target) as path:
            assert not target.exists()
            assert names(path) == {"data"}
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (names(target), names(tmp_path)) == ({"data"}, {"out"})


def test_a_target_that_a_killed_process_moved_comes_back(tmp_path, started):
    target = tmp_path / "out"
    target.mkdir()
    (target / "data").touch()
    process, path = started("aside", target)
    assert not target.exists()
    killed(process)
    remove_abandoned(target)
    assert names(target) == {"data"}
    assert not path.exists()
    assert names(tmp_path) == {"out"}


def test_a_target_that_is_there_again_stays(tmp_path, started):
    target = tmp_path / "out"
    target.mkdir()
    process, path = started("aside", target)
    target.mkdir()
    (target / "new").touch()
    killed(process)
    remove_abandoned(target)
    assert names(target) == {"new"}
    assert not path.exists()
