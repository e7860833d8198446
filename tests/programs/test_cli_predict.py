"""The commands profile, simulate, plan and trace on the toy program, and one line for everything that can be wrong."""

from __future__ import annotations

import json
import shutil

import pytest

import toys
from doubleweave.predict.find_profile import PROFILE_FILE
from doubleweave.predict.profile_file import read_profile
from doubleweave.schedule.choice import SCHEDULES
from doubleweave.timeline.trace_file import read_trace

REPORTED = ("schedule", "chunks", "makespan_s", "lower_bound_s", "overlap_efficiency", "busy_s")


def last_json(out):
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(toy_program_dir, made_once):
    """The toy program with a profile of this machine."""
    from doubleweave.cli.main import main

    def make(folder):
        shutil.copytree(toy_program_dir, folder)
        assert main(["profile", str(folder), "--runs", "2", "--max-cached", "128"]) == 0

    return made_once("measured", make)


def test_profile_measures_every_segment(measured, toy_program):
    profile = read_profile(measured / PROFILE_FILE)
    assert profile.kind == "measured"
    assert set(profile.segments) == {segment.name for segment in toy_program.split.segments}
    for by_threads in profile.segments.values():
        assert 1 in by_threads
        for table in by_threads.values():
            assert all(us > 0 for row in table.us for us in row)
            assert len(table.spread) == len(table.rows)
    assert profile.segments["attention"][1].cached[-1] == 128
    assert profile.decisions[-1].tokens == toys.MAX_CONTEXT


def test_profile_says_what_it_found(cli, toy_program_dir, tmp_path):
    out = tmp_path / "own.toml"
    code, text, err = cli("profile", toy_program_dir, "--runs", 1, "--max-cached", 64, "-o", out, "--json")
    assert (code, err) == (0, "")
    assert "what --schedule auto does:" in text
    assert last_json(text)["kind"] == "measured"
    assert read_profile(out).threads >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["own.toml"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_simulate_and_bench_report_alike(cli, measured, schedule):
    _, out, _ = cli(
        "bench", measured, "--prompt-len", 100, "--gen", 0, "--runs", 2, "--schedule", schedule, "--json"
    )
    ran = last_json(out)
    code, out, err = cli("simulate", measured, "--prompt-len", 100, "--schedule", schedule, "--json")
    assert (code, err) == (0, "")
    predicted = last_json(out)
    for report in (ran, predicted):
        assert all(report[key] is not None for key in REPORTED)
        assert report["lower_bound_s"] > 0
        assert sum(tokens for _, tokens, _ in report["chunks"]) == 100
        assert len(report["busy_s"]) == len(report["workers"])
        assert report["overlap_efficiency"] == pytest.approx(report["lower_bound_s"] / report["makespan_s"])
    assert predicted["chunks"] == ran["chunks"]
    assert predicted["workers"] == ran["workers"]
    assert predicted["overlap_efficiency"] <= 1


def test_plan_chooses_the_fastest_and_run_follows_it(cli, measured):
    code, out, err = cli("plan", measured, "--prompt-len", "40,200", "--json")
    assert (code, err) == (0, "")
    for plan in last_json(out)["plans"]:
        best = min(item["makespan_s"] for item in plan["candidates"])
        assert plan["makespan_s"] <= 1.01 * best
        assert plan["bound"]
        assert plan["bottleneck"] == "cpu"
        assert 0 <= plan["hidden"] <= 1
    assert "limited by its" in out
    _, out, _ = cli("run", measured, "-p", "x" * 200, "-n", 2, "--json")
    assert last_json(out)["schedule"].startswith("auto")


@pytest.mark.parametrize("command", ["run", "bench", "simulate"])
@pytest.mark.parametrize("extension", ["json", "svg", "png"])
def test_traces(cli, measured, tmp_path, command, extension):
    if extension != "json":
        pytest.importorskip("matplotlib")
    file = tmp_path / f"trace.{extension}"
    options = {
        "run": ["-p", "x" * 90, "-n", 2],
        "bench": ["--prompt-len", 90, "--gen", 0, "--runs", 1],
        "simulate": ["--prompt-len", 90],
    }[command]
    code, out, err = cli(
        command, measured, *options, "--schedule", "wavefront", "--threads", 1, "--trace", file
    )
    assert (code, err) == (0, "")
    assert f"trace written to {file}" in out
    begin = {"json": b"{", "svg": b"<?xml", "png": b"\x89PNG"}[extension]
    assert file.read_bytes().startswith(begin)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if extension == "json":
        assert len(read_trace(file).events) > 5


def test_trace_compares_what_was_predicted_with_what_was_measured(cli, measured, tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    same = ["--prompt-len", 100, "--schedule", "sequential", "--threads", 1]
    cli("simulate", measured, *same, "--trace", files[0])
    cli("bench", measured, *same, "--gen", 0, "--runs", 1, "--trace", files[1])
    code, out, err = cli("trace", *files, "--limit", 3, "--json")
    assert (code, err) == (0, "")
    found = last_json(out)
    assert (found["only_a"], found["only_b"], found["moved"]) == ([], [], 0)
    assert {kind["kind"] for kind in found["kinds"]} >= {"attention", "block_*", "lm_head"}
    assert sum(kind["tasks"] for kind in found["kinds"]) == len(found["tasks"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["simulate", "--prompt-len", 0], "prompt-len: found 0, expected 1 to 256"),
        (["simulate", "--prompt-len", 257], "prompt-len: found 257, expected 1 to 256"),
        (["simulate", "--schedule", "best"], "schedule: found 'best', expected one of auto, sequential"),
        (["simulate", "--threads", 0], "threads: found 0, expected 1 to 1024"),
        (["plan", "--threads", 10**9], "threads: found 1000000000, expected 1 to 1024"),
        (
            ["simulate", "--prompt-len", 9, "--trace", "x.pdf"],
            "trace: found 'x.pdf', expected a file name that ends in .json",
        ),
        (
            ["simulate", "--prompt-len", 9, "--trace", "/nowhere/x.json"],
            "trace: folder /nowhere does not exist; make it first",
        ),
        (
            ["simulate", "--prompt-len", 9, "--workers", "cpu,tpu", "--schedule", "pipelined"],
            "workers: found 'tpu', expected cpu or any",
        ),
        (
            ["simulate", "--workers", "any,any"],
            "workers: found any,any with schedule auto, which chooses them; name a schedule",
        ),
        (
            ["simulate", "--workers", "cpu,cpu", "--schedule", "sequential"],
            "workers: found cpu,cpu with schedule sequential, whose one worker runs everything; leave them out",
        ),
        (["bench", "--prompt-len", 9, "--gen", 0, "--chunk", 8], "chunk: found 8 with schedule auto"),
        (["simulate", "--chunk", 0, "--schedule", "pipelined"], "chunk: found 0, expected at least 1"),
        (
            ["simulate", "--prompt-len", 9, "--profile", "sm1"],
            "profile: found 'sm1', expected a .toml file or one of generic, intel",
        ),
        (
            ["simulate", "--prompt-len", 9, "--profile", "missing.toml"],
            "missing.toml: cannot be read as a profile",
        ),
        (["plan", "--prompt-len", "9,x"], "prompt-len: found 'x', expected numbers from 1 to 256"),
        (["plan", "--prompt-len", ""], "prompt-len: found '', expected numbers from 1 to 256"),
        (["profile", "--runs", 0], "profile: found 0 runs"),
        (["profile", "--threads", 1000], "threads: found 1000, expected 1 to"),
        (["profile", "-o", "profile.json"], "out: found profile.json, expected a file that ends in .toml"),
    ],
)
def test_what_is_refused(refused, toy_program_dir, argv, message):
    command, *options = argv
    assert message in refused(command, toy_program_dir, *options)


@pytest.mark.parametrize("command", ["profile", "simulate", "plan"])
def test_a_folder_without_a_program(refused, tmp_path, command):
    assert str(tmp_path) in refused(command, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a trace"),
        ("", "cannot be read as a trace"),
        ("[]", "is no trace of doubleweave; expected a file that --trace FILE.json wrote"),
        ('{"traceEvents": []}', "is no trace of doubleweave"),
        ('{"otherData": {"format": "doubleweave timeline 1"}}', "is a damaged trace"),
    ],
)
def test_what_is_no_trace(refused, tmp_path, content, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_text(content)
    assert message in refused("trace", file, file)


def test_a_profile_of_another_program(refused, measured, toy_static_dir):
    line = refused("simulate", toy_static_dir, "--prompt-len", 9, "--profile", measured / PROFILE_FILE)
    assert "was measured for program" in line
    assert "measure it with doubleweave profile" in line
