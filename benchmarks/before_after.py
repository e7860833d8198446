"""Two checkouts of Doubleweave side by side, in one run: prefill, decode, first tokens, and predicting.

`before_after.py BEFORE AFTER`: two checkouts, each with its own `.venv` and a program in `programs/smollm2`. Every
number comes from fresh processes of the one and the other in turn; the table has medians, their spread, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from common import finish, note, table

_PROMPTS = (128, 512, 2048)
_DECODED = 64
# 2,000 chunks of a toy program of 30 layers: pattern, graph, schedule and simulation.
_SIMULATE = """
import sys, time
sys.path.insert(0, "tests")
import toys
try:
    from doubleweave.ir.split import rows
    from doubleweave.schedule.chunks import cut
    from doubleweave.schedule.makers import make
    from doubleweave.schedule.simulate import times
    from doubleweave.schedule.task_graph import build
except ImportError:  # before there were packages
    from doubleweave.chunks import cut
    from doubleweave.ir import rows
    from doubleweave.makers import make
    from doubleweave.simulate import times
    from doubleweave.tasks import build
split = toys.split(30, rows(1, 8), static_device="npu")
build(split, cut(16, rows(1, 8)), "last", 8)
start = time.perf_counter()
graph = build(split, cut(8 * 2000, rows(1, 8)), "last", 8)
costs = toys.unit_costs(graph)
times(graph, make("out_of_order", graph, ("npu", "cpu"), costs), costs)
print(time.perf_counter() - start)
"""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--rounds", type=int, default=7, metavar="R", help="of each number (default 7)")
    args = p.parse_args()
    checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(args.rounds + 1):
        for name, measure in measures().items():
            # Who comes first changes from round to round: what the first one leaves in caches helps the second.
            for which in sorted(checkouts, reverse=bool(number % 2)):
                values = measure(checkouts[which])
                for part, value in values.items():
                    if number:  # the first round brings files into memory
                        found.setdefault(f"{name}{part}", {}).setdefault(which, []).append(value)
        note(f"round {number}/{args.rounds}")
    rows = [["", "before", "after", "after / before"]]
    for name, both in found.items():
        before, after = (statistics.median(both[which]) for which in ("before", "after"))
        ratio = statistics.median(b / a for a, b in zip(both["before"], both["after"], strict=True))
        rows.append([name, text(both["before"]), text(both["after"]), f"{ratio:.3f} ({after / before:.3f})"])
    finish("before_after", [table(rows)], found)


def text(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


def measures() -> dict[str, Callable[[Path], dict[str, float]]]:
    """What is measured, by name; each gives numbers by the end of their names."""
    found: dict[str, Callable[[Path], dict[str, float]]] = {}
    for length in _PROMPTS:
        found[f"{length} tokens: "] = lambda folder, n=length: bench(folder, n)
    found["first token, doubleweave run, s"] = lambda folder: first_token(folder, "doubleweave", "run")
    found["first token, doubleweave-run, s"] = lambda folder: first_token(folder, "doubleweave-run")
    found["2,000 chunks simulated, s"] = lambda folder: {"": float(said(folder, "python", "-c", _SIMULATE))}
    return found


def bench(folder: Path, length: int) -> dict[str, float]:
    argv = ("bench", "programs/smollm2", "--prompt-len", str(length), "--gen", str(_DECODED), "--runs", "3")
    report = json.loads(said(folder, "doubleweave", *argv, "--json").splitlines()[-1])
    return {f"{key}, tok/s": report[f"{key}_tok_per_s"] for key in ("prefill", "decode")}


def first_token(folder: Path, *command: str) -> dict[str, float]:
    """Seconds from the start of a process to the first byte of its answer."""
    ids = folder / ".bench" / "ids.json"
    ids.parent.mkdir(exist_ok=True)
    ids.write_text(json.dumps(list(range(100, 132))))
    argv = [
        folder / ".venv" / "bin" / command[0],
        *command[1:],
        "programs/smollm2",
        "--token-ids",
        ids,
        "-n",
        "2",
    ]
    start = time.perf_counter()
    with subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        took = time.perf_counter() - start
        process.stdout.read()
    return {"": took}


def said(folder: Path, program: str, *argv: str) -> str:
    """What a program of a checkout's environment prints."""
    command = [folder / ".venv" / "bin" / program, *argv]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
