"""The command line's help, and one line for wrong usage."""

from __future__ import annotations

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
        (["score", "x"], "the following arguments are required: FILE"),
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
