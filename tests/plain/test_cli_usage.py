"""The command line's help, and one line for wrong usage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("compile", "run", "inspect", "bench", "score", "profile", "simulate", "plan", "trace")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    code, out, err = cli(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: doubleweave {command}")
    assert "--json" in out


def test_help_lists_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(f"  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["walk"], "invalid choice: 'walk'"),
        (["run"], "the following arguments are required: DIR"),
        (["run", "x", "--fast"], "unrecognized arguments: --fast"),
        (["run", "x", "-n", "many"], "argument -n/--num: invalid int value: 'many'"),
        (["run", "x", "--threads", "two"], "argument --threads: invalid int value"),
        (["run", "x", "--temperature", "warm"], "argument --temperature: invalid float value"),
        (["compile", "x"], "the following arguments are required: -o/--out"),
        (["score"], "the following arguments are required: DIR"),
    ],
)
def test_wrong_usage_is_one_line_that_points_to_help(refused, argv, message):
    line = refused(*argv)
    assert message in line
    assert line.endswith("--help)")


def test_every_command_is_named_in_the_readme() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    for command in ("compile", "run", "inspect", "bench", "score"):
        assert f"doubleweave {command} " in text


@pytest.fixture
def broken_doctor(monkeypatch):
    """The command doctor meets a mistake of ours."""
    from doubleweave.cli import doctor

    def examine():
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(doctor, "examine", examine)


def test_an_unexpected_error_is_one_sentence(cli, broken_doctor):
    code, out, err = cli("doctor")
    assert (code, out) == (70, "")
    assert err.startswith("doubleweave: unexpected KeyError: 'first line")
    assert err.endswith("; please report it with the output of --traceback\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [("--traceback", "doctor"), ("doctor", "--traceback")])
def test_the_traceback_of_an_unexpected_error(cli, broken_doctor, argv):
    code, _, err = cli(*argv)
    assert code == 70
    assert "Traceback (most recent call last)" in err
    assert "examine" in err
    assert err.splitlines()[-1].startswith("doubleweave: unexpected KeyError")


def test_a_user_s_mistake_keeps_exit_code_2(cli, tmp_path):
    code, _, err = cli("inspect", tmp_path / "nothing", "--traceback")
    assert code == 2
    assert "Traceback" in err
    code, _, err = cli("inspect", tmp_path / "nothing")
    assert code == 2
    assert err.count("\n") == 1


INTERRUPTED = """
import sys
from types import SimpleNamespace

from doubleweave.cli import main

def command(args):
    exec("raise KeyboardInterrupt")

main._parser = lambda: SimpleNamespace(parse_args=lambda words: SimpleNamespace(command=command))
sys.exit(main.main([]))
"""


def test_an_interrupt_within_an_exec_ends_with_the_code_and_not_by_the_signal(tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.strip()) == (130, "doubleweave: interrupted")
