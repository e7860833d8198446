"""OpenVINO's segments beside XNNPACK's: the same fixed sizes, 8-bit weights, the same attention, this machine's CPU.

One process a program and schedule; they take turns on the same prompts, paired by round. OpenVINO computes in bfloat16
where the processor has it, with threads of its own in every segment; XNNPACK in 8 bits. Perplexity is there for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from common import (
    DOUBLEWEAVE,
    ROOT,
    BenchmarkError,
    Prompts,
    compiled,
    finish,
    note,
    parser,
    run,
    spread,
    table,
)
from workers import Contest, Entrant, Workers

ESSAY = ROOT / "tests" / "data" / "essay.txt"
SCHEDULES = ("sequential", "out_of_order")


def main() -> None:
    args = arguments()
    programs = {
        "openvino 8w": compiled(args.cache / "programs" / "smollm2-8w-openvino", "--backend", "openvino"),
        "xnnpack 8da8w": compiled(args.cache / "programs" / "smollm2-8da8w-static", "--shape", "static"),
    }
    prompts = Prompts(programs["xnnpack 8da8w"])
    rows = [
        ["tokens", "segments", "schedule", "prefill tok/s", "over xnnpack", "decode tok/s", "over xnnpack"]
    ]
    found: dict[str, Any] = {}
    with Workers(args.cache / "logs") as workers:
        entrants = {
            (name, schedule): Entrant(
                workers.start(
                    f"{name}-{schedule}".replace(" ", "-"),
                    *(
                        "serve_doubleweave.py",
                        str(folder),
                        "--schedule",
                        schedule,
                        "--threads",
                        str(args.threads),
                    ),
                )
            )
            for name, folder in programs.items()
            for schedule in SCHEDULES
        }
        for length in args.prompt_len:
            note(f"{length} tokens")
            contest = Contest(entrants, lambda length=length: prompts.take(length), gen=args.gen)
            contest.run(args.rounds, args.warmup)
            found[str(length)] = at_length(contest, length, args, rows)
    perplexities = {name: perplexity(folder, args.threads) for name, folder in programs.items()}
    lines = [
        f"{args.rounds} rounds, {args.threads} threads; medians [interval], ratios by round to XNNPACK's",
        table(rows),
        "perplexity of essay.txt: "
        + ", ".join(f"{name} {value:.3f}" for name, value in perplexities.items()),
    ]
    finish("openvino", lines, {"rounds": args.rounds, "lengths": found, "perplexity": perplexities})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument(
        "--prompt-len", type=int, nargs="+", default=(128, 512, 1024), metavar="N", help="prompt tokens"
    )
    p.add_argument("--gen", type=int, default=32, metavar="N", help="tokens to decode (default 32)")
    p.add_argument("--rounds", type=int, default=7, metavar="R", help="measured rounds (default 7)")
    p.add_argument("--warmup", type=int, default=2, metavar="R", help="rounds before them (default 2)")
    return p.parse_args()


def at_length(
    contest: Contest, length: int, args: argparse.Namespace, rows: list[list[str]]
) -> list[dict[str, Any]]:
    result = []
    for (name, schedule), entrant in contest.entrants.items():
        peer = ("xnnpack 8da8w", schedule)
        shares = {
            what: spread(contest.ratios((name, schedule), peer, what)) for what in ("prefill_s", "decode_s")
        }
        rates = {
            "prefill_s": length / statistics.median(entrant.prefill_s),
            "decode_s": args.gen / statistics.median(entrant.decode_s),
        }
        rows.append([
            f"{length:,}", name, schedule, f"{rates['prefill_s']:.0f}", str(shares["prefill_s"]),
            f"{rates['decode_s']:.0f}", str(shares["decode_s"]),
        ])  # fmt: skip
        result.append({
            "segments": name, "schedule": schedule, "prefill_tok_per_s": rates["prefill_s"],
            "decode_tok_per_s": rates["decode_s"], "over_xnnpack": {k: v._asdict() for k, v in shares.items()},
        })  # fmt: skip
    return result


def perplexity(folder: Path, threads: int) -> float:
    note(f"perplexity of {folder.name}")
    command = [*DOUBLEWEAVE, "score", str(folder), str(ESSAY), "--threads", str(threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(
            f"{folder}: doubleweave score ended with {done.returncode}: {done.stderr.strip()}"
        )
    return float(json.loads(done.stdout.splitlines()[-1])["perplexity"])


if __name__ == "__main__":
    run(main)
