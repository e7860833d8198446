"""From process start to the first token of `doubleweave run`, seen from outside, in fresh processes.

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
    common = ["run", str(program), "-n", "2", "--threads", str(args.threads), "--json"]
    cpu = OtherCpu(lambda: ())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for number in range(args.runs + 1):
        for name, prompt in ways.items():
            one = first_byte([*DOUBLEWEAVE, *common, *prompt], cpu)
            if number:
                found[name].append(one)
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
    found: dict[str, list[dict[str, Any]]], args: argparse.Namespace
) -> tuple[list[str], dict[str, Any]]:
    rows = [["prompt as", "tokens", "median s [interval]", "min", "max", "of it prefill s", "target"]]
    result: dict[str, Any] = {"runs": args.runs, "threads": args.threads}
    for name, runs in found.items():
        seconds = [one["first_s"] for one in runs]
        inside = statistics.median(one["said"]["ttft_s"] for one in runs)
        tokens = runs[0]["said"]["prompt_tokens"]
        goal = target(statistics.median(seconds), TARGET_S, at_least=False)
        rows.append([
            name, str(tokens), str(spread(seconds)), f"{min(seconds):.2f}", f"{max(seconds):.2f}", f"{inside:.2f}",
            f"{TARGET_S} {'met' if goal['met'] else 'not met'}",
        ])  # fmt: skip
        result[name.replace(" ", "_")] = {
            "prompt_tokens": tokens,
            "first_token_s": {**spread(seconds)._asdict(), "min": min(seconds), "max": max(seconds)},
            "of_it_prefill_s": inside,
            "target": goal,
        }
    return [
        f"process start to first token, {args.runs} fresh processes each, alternating",
        table(rows),
    ], result


if __name__ == "__main__":
    run(main)
