"""Everything that runs or predicts a prompt gives one answer: the same choice and the same schedule, task by task."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import doubleweave as dw
from doubleweave.ir import manifest
from doubleweave.predict.estimate import Device
from doubleweave.predict.find_profile import find_profile, program_id, shipped
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.planner import decisions, forecast, plan, simulate
from doubleweave.predict.profile import Measured, Profile
from doubleweave.predict.profile_file import write_profile
from doubleweave.predict.run_file import write_run_file
from doubleweave.schedule.choice import SCHEDULES, Wish

RUNNER = Path(sys.executable).parent / "doubleweave-run"
SHOWN = ("-n", "1", "--show-schedule", "--json")
NUM_CASES = 50


class Case(NamedTuple):
    program: str
    profile: Profile
    num_tokens: int
    wish: Wish


def random_profile(dice: random.Random, split: Any) -> Profile:
    """Measured with decisions or without, estimated, or shipped."""
    devices = sorted({segment.device for segment in split.segments})
    kind = dice.choice(["measured", "decided", "estimated", "generic", "sm8650"])
    if kind in ("generic", "sm8650"):
        return shipped(kind)
    pairs = {(a, b): dice.uniform(1, 9) for a in devices for b in devices}

    def measured() -> Measured:
        us = tuple(tuple(dice.uniform(10, 900) for _ in range(3)) for _ in range(3))
        return Measured((1, 9, 32), (0, 40, 200), us, repeated=(0.9, 0.8, 0.7))

    tables = {segment.name: {1: measured(), 2: measured()} for segment in split.segments}
    found = Profile(
        "made up",
        "measured",
        segments=tables if kind != "estimated" else {},
        devices={device: Device(5.0, 1.0, 20.0, {"float32": 100.0, "int8": 300.0}) for device in devices},
        hand_over_us=pairs,
        contention={2: {pair: dice.uniform(0, 0.4) for pair in pairs}},
        same_worker_us=0.7,
    )
    if kind != "decided":
        return found
    return replace(found, threads=2, decisions=decisions(RunPlanner(split, found, 256), 2, 256))


def cases(folders: dict[str, Path]) -> list[Case]:
    dice = random.Random(11)
    found = []
    for _ in range(NUM_CASES):
        name = dice.choice(sorted(folders))
        split = manifest.read(folders[name]).split
        schedule = dice.choice(["auto", *SCHEDULES])
        devices = sorted({segment.device for segment in split.segments})
        workers = chunk = None
        if schedule not in ("auto", "sequential") and dice.random() < 0.3:
            workers = (*devices, dice.choice([*devices, "any"]))
        if schedule != "auto" and dice.random() < 0.3:
            chunk = dice.choice([8, 20, 32])
        wish = Wish(schedule, dice.choice([None, 1, 2]), workers, chunk)
        found.append(Case(name, random_profile(dice, split), dice.choice([1, 5, 33, 77, 150, 240]), wish))
    return found


@pytest.fixture(scope="module")
def folders(toy_program_dir: Path, toy_static_dir: Path) -> dict[str, Path]:
    return {"bounded": toy_program_dir, "static": toy_static_dir}


def options(wish: Wish) -> list[str]:
    named = {"threads": wish.threads, "chunk": wish.chunk, "workers": wish.workers and ",".join(wish.workers)}
    return ["--schedule", wish.schedule, *(f"--{key}={value}" for key, value in named.items() if value)]


def text_in(out: str) -> str:
    return "\n".join(line for line in out.splitlines() if line.startswith(("cpu:", "npu:", "any:")))


def test_every_way_gives_the_same_choice_and_schedule(folders, cli, tmp_path):
    schedules = set()
    for number, case in enumerate(cases(folders)):
        folder = Path(shutil.copytree(folders[case.program], tmp_path / str(number)))
        found = manifest.read(folder)
        profile = case.profile
        if profile.segments:
            profile = replace(profile, program=program_id(found.split))
        file = tmp_path / f"{number}.toml"
        write_profile(profile, file)
        profile = find_profile(folder, found, str(file))
        ids = [token % 200 for token in range(case.num_tokens)]

        session = dw.open(folder).session(
            case.wish.schedule,
            case.wish.threads,
            workers=case.wish.workers,
            chunk=case.wish.chunk,
            profile=str(file),
        )
        session.append(ids, record=True)
        choice, verified = session.recorded.choice, session.recorded.verified
        text = verified.schedule.text(verified.graph)
        schedules.add(choice.schedule)
        assert choice.threads <= session.threads

        # A prediction for another machine may have more threads than this one; a run here has at most its cores.
        wish = case.wish._replace(threads=session.threads)
        planner = RunPlanner(found.split, profile, found.model.max_context)
        assert planner.choose(wish, case.num_tokens) == choice
        planned = planner.plan_run(choice, case.num_tokens)
        assert planned.verified.schedule.text(planned.graph) == text

        argv = (folder, "--prompt-len", case.num_tokens, "--profile", file, "--json")
        code, out, err = cli("simulate", *argv, *options(wish), "--show-schedule")
        if code:  # more workers than the chip of the profile runs at once
            assert "that run tasks of device" in err
            assert "expected at most 1" in err
        else:
            assert text_in(out) == text
        code, out, err = cli("bench", *argv, *options(case.wish), "--gen", 0, "--runs", 1)
        assert code == 0, err
        report = json.loads(out.splitlines()[-1])
        assert (report["threads"], report["workers"]) == (session.threads, list(verified.schedule.devices))
        assert [tuple(chunk) for chunk in report["chunks"]] == list(verified.graph.chunks)
        if case.wish.schedule == "auto":
            made = plan(planner, case.num_tokens, session.threads)
            assert made.auto == forecast(simulate(planner, choice, case.num_tokens))
        session.reset()
        session.score(ids)  # as the command score does: in pieces of several chunks, all rows
        for (_, length, _, want, taken), prepared in session._prepared.items():
            assert taken == planner.choose(wish, length)
            scored = prepared.verified
            planned = planner.plan_run(taken, length, want)
            assert scored.schedule.text(scored.graph) == planned.schedule.text(planned.graph)

        write_run_file(folder, found, profile)
        (folder / "ids.json").write_text(json.dumps(ids))
        done = subprocess.run(
            [RUNNER, folder, "--token-ids", folder / "ids.json", *options(case.wish), *SHOWN],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert text_in(done.stdout) == text
        assert json.loads(done.stdout.splitlines()[-1])["threads"] == session.threads
    assert schedules == set(SCHEDULES[1:])
