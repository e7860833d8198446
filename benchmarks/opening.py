"""How quickly a large program opens, and how much memory it then takes: with packed weights in memory and in files.

Programs of random weights in true shapes (real_sizes.py). The clock starts before the process is made and stops when
the first token behind a prompt is there; for doubleweave-run, when the process that gives one token has ended.
Memory is the proportional share (PSS), of one process and of two at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import real_sizes
from common import BenchmarkError, finish, note, parser, run, spread, table, target
from compile_run import timed_compile
from machine import OtherCpu

# By shape: seconds to the first token when it is opened again.
GOALS = {"llama-1b": 0.6, "qwen3-4b": 1.0, "llama-8b": 1.0}
MOST_RESIDENT = 1.15
_TOKENS = 32
WAYS = ("memory", "written", "again")
RUNNER = str(Path(sys.executable).parent / "doubleweave-run")

# Prints how long it took, and then, on request, how much memory it has.
_OPEN = """
import json, sys
import doubleweave
session = doubleweave.open(sys.argv[1]).session()
session.append(list(range(1, int(sys.argv[2]) + 1)))
print("first", flush=True)
sys.stdin.readline()
kinds = (line.split() for line in open("/proc/self/smaps_rollup"))
found = {kind[0]: int(kind[1]) * 1024 for kind in kinds if kind[0] in ("Pss:", "Pss_Anon:", "Pss_File:")}
print(json.dumps(found), flush=True)
sys.stdin.readline()
"""


def main() -> None:
    args = arguments()
    rows = [
        [
            "shape",
            "program GB",
            "in memory s",
            "files written s",
            "again s",
            "goal",
            "resident",
            "goal",
            "two",
        ]
    ]
    runner_rows = [["shape", "doubleweave-run: in memory s", "files written s", "again s", "goal"]]
    results: dict[str, Any] = {}
    for shape in args.shape or ["llama-1b"]:
        program = program_of(shape, args.cache)
        found = measured(program, args.cache / "opening-cache", args.rounds)
        size = (program / "program.pte").stat().st_size
        speed = target(statistics.median(found["again"]), GOALS[shape], at_least=False)
        resident = target(found["resident"] / size, MOST_RESIDENT, at_least=False)
        held = [f"{goal['at_most']:g} {'met' if goal['met'] else 'not met'}" for goal in (speed, resident)]
        rows.append(
            [
                shape,
                f"{size / 1e9:.2f}",
                *(str(spread(found[way])) for way in ("memory", "written", "again")),
                held[0],
                f"{resident['value']:.2f}",
                held[1],
                f"{found['two'] / size:.2f}",
            ]
        )
        alone = measured_runner(program, args.cache / "opening-cache", args.rounds)
        runner_speed = target(statistics.median(alone["again"]), GOALS[shape], at_least=False)
        goal = f"{runner_speed['at_most']:g} {'met' if runner_speed['met'] else 'not met'}"
        runner_rows.append([shape, *(str(spread(alone[way])) for way in WAYS), goal])
        targets = {"again_s": speed, "resident": resident, "runner_again_s": runner_speed}
        results[shape] = found | {"doubleweave-run": alone, "program_bytes": size, "targets": targets}
    finish("opening", [table(rows), table(runner_rows)], {"tokens": _TOKENS, "shapes": results})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    real_sizes.add_shape(p)
    p.add_argument("--rounds", type=int, default=5, metavar="R", help="openings of each kind (default 5)")
    return p.parse_args()


def program_of(shape: str, cache: Path) -> Path:
    """The shape's program, compiled first if it is missing."""
    program = cache / "programs" / f"{shape}-{real_sizes.RECIPE}"
    if not program.exists():
        weights = real_sizes.weights_of(shape, cache)
        note(f"compiling {shape}")
        timed_compile(weights, program, real_sizes.OPTIONS)
    return program


def measured(program: Path, cache: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each opening, and bytes."""
    cpu = OtherCpu(lambda: ())
    found: dict[str, Any] = {"memory": [], "written": [], "again": []}
    for number in range(rounds + 1):
        shutil.rmtree(cache, ignore_errors=True)
        for way, folder in (("memory", "off"), ("written", str(cache)), ("again", str(cache))):
            with Opened(program, folder) as opened:
                if number:  # the first round brings the program into the page cache
                    found[way].append(opened.seconds)
                if way == "memory":
                    found["resident_in_memory"] = opened.memory()["Pss:"]
                if way == "again":
                    # The whole context's cache would count as well; 32 tokens take next to nothing.
                    found["resident"] = opened.memory()["Pss:"]
    with Opened(program, str(cache)) as one, Opened(program, str(cache)) as other:
        found["two"] = one.memory()["Pss:"] + other.memory()["Pss:"]
    shutil.rmtree(cache, ignore_errors=True)
    return found | {"other_cpu": cpu.lap()}


def measured_runner(program: Path, cache: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each run of doubleweave-run."""
    ids = cache.with_name("opening-ids.json")
    ids.write_text(json.dumps(list(range(1, _TOKENS + 1))))
    command = [RUNNER, str(program), "--token-ids", str(ids), "-n", "1"]
    cpu = OtherCpu(lambda: ())
    found: dict[str, Any] = {way: [] for way in WAYS}
    for _ in range(rounds):
        shutil.rmtree(cache, ignore_errors=True)
        for way in WAYS:
            folder = "off" if way == "memory" else str(cache)
            start = time.perf_counter()
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"DOUBLEWEAVE_CACHE": folder}
            )
            found[way].append(time.perf_counter() - start)
            if done.returncode:
                raise BenchmarkError(f"doubleweave-run failed: {done.stderr.strip()[-500:]}")
    shutil.rmtree(cache, ignore_errors=True)
    return found | {"other_cpu": cpu.lap()}


class Opened:
    """A process that has opened the program, and how long it took to the first token."""

    def __init__(self, program: Path, cache: str) -> None:
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OPEN, str(program), str(_TOKENS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"DOUBLEWEAVE_CACHE": cache},
        )
        self._line()
        self.seconds = time.perf_counter() - start

    def memory(self) -> dict[str, int]:
        """Bytes now."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, int] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"opening failed: {self._process.stderr.read().strip()[-500:]}")
        return line

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    run(main)
