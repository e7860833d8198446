"""Decoders of other kinds beside llama.cpp: a hybrid of convolutions and attention, and a mixture of experts.

Random weights in true shapes (serve/make_random.py), the same numbers for both engines. In every round each engine gets
the same token ids in turn while the others are stopped, as in peers.py; both run on the same number of threads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from common import BenchmarkError, Prompts, compiled, finish, note, parser, run, target
from peers import OURS, add_contest, report, start_llama, start_ours, summarise
from workers import SERVE, Contest, Workers

SHAPES = ("lfm2-350m", "moe-1b")
LEAST_RATIO = 1.0  # of our speed over llama.cpp's
LLAMA = {"8da8w": "Q8_0", "8da4w": "Q4_0"}


def main() -> None:
    args = arguments()
    lines, results = [], []
    for shape in args.shape or SHAPES:
        for recipe in args.quantize or LLAMA:
            result = measured(args, shape, recipe)
            results.append({"shape": shape, "quantize": recipe, **result})
            lines += [f"{shape}, {recipe} beside {LLAMA[recipe]}", *report(result, args), ""]
    finish("decoders", lines, {
        "threads": args.threads, "schedule": args.schedule, "gen": args.gen, "rounds": args.rounds, "results": results,
    })  # fmt: skip


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated (default: all)")
    p.add_argument(
        "--quantize", choices=sorted(LLAMA), action="append", help="may be repeated (default: all)"
    )
    p.add_argument("--prompt-len", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    add_contest(p)
    return p.parse_args()


def measured(args: argparse.Namespace, shape: str, recipe: str) -> dict[str, object]:
    folder, gguf = weights(args.cache, shape)
    options = ("--quantize", recipe, "--max-context", "4096")
    program = compiled(args.cache / "programs" / f"{shape}-{recipe}", *options, source=str(folder))
    start = start_llama(LLAMA[recipe], shape, lambda: gguf)
    with Workers(args.cache / "logs") as workers:
        entrants = {OURS: start_ours(args, workers, program)}
        peer = start(args, workers, args.prompt_len + args.gen + 8)
        name = peer.worker.name
        entrants[name] = peer
        contest = Contest(entrants, partial(Prompts(program).take, args.prompt_len), args.gen)
        contest.run(args.rounds, args.warmup)
        result = summarise(contest, args.prompt_len)
    ratios = {"prefill": result["prefill_ratio"], "decode": result["decode_ratio"]}
    goals = {
        f"{what} over {name}": target(found[name]["median"], LEAST_RATIO, at_least=True)
        for what, found in ratios.items()
        if found
    }
    return {**result, "targets": goals}


def weights(cache: Path, shape: str) -> tuple[Path, Path]:
    folder, gguf = cache / "weights" / shape, cache / "weights" / f"{shape}.F16.gguf"
    if not gguf.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        note(f"making random weights of {shape}")
        part = gguf.with_suffix(".part")
        if subprocess.run([sys.executable, SERVE / "make_random.py", shape, folder, part]).returncode:
            raise BenchmarkError(f"{shape}: its weights could not be written")
        part.rename(gguf)
    return folder, gguf


if __name__ == "__main__":
    run(main)
