"""From process start to the first token of `doubleweave run` and of `doubleweave-run`, in fresh processes, alternating.

The clock starts before the process is made and stops when the first byte of the answer comes through the
pipe: the interpreter, opening the program and packing the weights are all in it. The program file is in the
page cache (one unmeasured run before).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import (
    DOUBLEWEAVE,
    TEXT,
    BenchmarkError,
    Prompts,
    finish,
    note,
    parser,
    program_folder,
    run,
    spread,
    table,
    target,
)
from machine import OtherCpu

TARGET_S = 1.5
NATIVE = [str(Path(sys.executable).parent / "doubleweave-run")]
NATIVE_SHARE = 0.7


def main() -> None:
    args = arguments()
    program = program_folder(args)
    args.cache.mkdir(parents=True, exist_ok=True)
    ids_file = args.cache / "startup-ids.json"
    ids_file.write_text(json.dumps(Prompts(program).take(args.prompt_len)))
    ways = {
        "token ids": ["--token-ids", str(ids_file)],
        "text": ["-p", chat_prompt(program, args.prompt_len)],
    }
    common = [str(program), "-n", "2", "--threads", str(args.threads), "--json"]
    prepare = [*DOUBLEWEAVE, "prepare", str(program), "--threads", str(args.threads)]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    commands = {
        (name, by): [*start, *common, *prompt]
        for name, prompt in ways.items()
        for by, start in (("doubleweave run", [*DOUBLEWEAVE, "run"]), ("doubleweave-run", NATIVE))
    }
    cpu = OtherCpu(lambda: ())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {way: [] for way in commands}
    for number in range(args.runs + 1):
        for way, command in commands.items():
            one = first_byte(command, cpu)
            if number:
                found[way].append(one)
        note(f"run {number}/{args.runs}")
    finish("startup", *report(found, args))


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--prompt-len", type=int, default=32, metavar="N", help="prompt tokens (default 32)")
    p.add_argument(
        "--runs", type=int, default=9, metavar="R", help="fresh processes for each way (default 9)"
    )
    return p.parse_args()


def chat_prompt(program: Path, length: int) -> str:
    """The longest start of the text that fills at most `length` tokens with the chat template around it
    (at least one word)."""
    import doubleweave

    text = doubleweave.open(program).text
    words = TEXT.read_text().split()
    count = 1
    while len(text.encode(" ".join(words[: count + 1]))) <= length:
        count += 1
    return " ".join(words[:count])


def first_byte(command: list[str], cpu: OtherCpu) -> dict[str, Any]:
    """Run to the end; `first_s` is the time to the first byte of standard output."""
    cpu.lap()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        head = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter()
        rest, errors = process.stdout.read(), process.stderr.read().decode()
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit code {process.returncode}: {errors.strip()}")
    said = json.loads((head + rest).decode().strip().splitlines()[-1])
    if not said["new_tokens"]:
        raise BenchmarkError(f"{' '.join(command)}: gave no token, so there is no first one to time")
    return {"first_s": first - start, "said": said, "other_cpu": cpu.lap()}


def report(
    found: dict[tuple[str, str], list[dict[str, Any]]], args: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    rows = [
        ["prompt as", "program", "tokens", "median s [interval]", "min", "max", "of it prefill s", "target"]
    ]
    result: dict[str, Any] = {"runs": args.runs, "threads": args.threads}
    goals = {}
    for (name, by), runs in found.items():
        seconds = [one["first_s"] for one in runs]
        inside = statistics.median(one["said"]["ttft_s"] for one in runs)
        tokens = runs[0]["said"]["prompt_tokens"]
        goal = target(statistics.median(seconds), TARGET_S, at_least=False)
        rows.append([
            name, by, str(tokens), str(spread(seconds)), f"{min(seconds):.2f}", f"{max(seconds):.2f}", f"{inside:.2f}",
            f"{TARGET_S} {'met' if goal['met'] else 'not met'}",
        ])  # fmt: skip
        result[f"{by}, {name}"] = {
            "prompt_tokens": tokens,
            "first_token_s": {**spread(seconds)._asdict(), "min": min(seconds), "max": max(seconds)},
            "of_it_prefill_s": inside,
            "target": goal,
        }
    for name in dict.fromkeys(name for name, _ in found):
        pairs = zip(found[name, "doubleweave-run"], found[name, "doubleweave run"], strict=True)
        ratio = statistics.median(native["first_s"] / python["first_s"] for native, python in pairs)
        goals[f"doubleweave-run over doubleweave run, {name}"] = target(ratio, NATIVE_SHARE, at_least=False)
        tokens = {
            tuple(run["said"]["token_ids"])
            for by in ("doubleweave-run", "doubleweave run")
            for run in found[name, by]
        }
        if len(tokens) != 1:
            raise BenchmarkError(f"{name}: the two programs gave different tokens: {tokens}")
    return [
        f"process start to first token, {args.runs} fresh processes each, alternating",
        table(rows),
        *(
            f"{name}: {goal['value']:.2f}, {'met' if goal['met'] else 'not met'}"
            for name, goal in goals.items()
        ),
    ], {**result, "targets": goals}


if __name__ == "__main__":
    run(main)
