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

import peer_env
from common import DOUBLEWEAVE, BenchmarkError, Prompts, finish, note, parser, run, target
from peers import N_UBATCH, OURS, report, summarise
from workers import SERVE, Contest, Entrant, Workers

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
    p.add_argument("--gen", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    p.add_argument("--rounds", type=int, default=9, metavar="R", help="measured rounds (default 9)")
    p.add_argument("--warmup", type=int, default=2, metavar="R", help="rounds before them (default 2)")
    p.add_argument("--schedule", default="wavefront", help="Doubleweave's schedule (default wavefront)")
    p.add_argument(
        "--warn-other-cpu", type=float, default=5.0, metavar="PERCENT",
        help="warn when other processes take more of the machine than this in a round (default 5)",
    )  # fmt: skip
    return p.parse_args()


def measured(args: argparse.Namespace, shape: str, recipe: str) -> dict[str, object]:
    folder, gguf = weights(args.cache, shape)
    program = compiled(args.cache, folder, shape, recipe)
    kind = LLAMA[recipe]
    peer = peer_env.requantised_gguf(args.cache, gguf, kind, shape)
    context = args.prompt_len + args.gen + 8
    sizes = [text for size in N_UBATCH for text in ("--n-ubatch", str(size))]
    llama = [str(peer), "--threads", str(args.threads), "--context", str(context), *sizes]
    ours = [str(program), "--schedule", args.schedule, "--threads", str(args.threads)]
    with Workers(args.cache / "logs") as workers:
        entrants = {OURS: Entrant(workers.start(OURS, "serve_doubleweave.py", *ours))}
        worker = workers.start(
            f"llama-{kind.lower()}", "serve_llama_cpp.py", *llama, python=peer_env.llama_cpp(args.cache)
        )
        entrants[worker.name] = Entrant(worker, variants=[{"n_ubatch": size} for size in N_UBATCH])
        contest = Contest(entrants, partial(Prompts(program).take, args.prompt_len), args.gen)
        contest.run(args.rounds, args.warmup)
        result = summarise(contest, args.prompt_len)
    ratios = {"prefill": result["prefill_ratio"], "decode": result["decode_ratio"]}
    goals = {
        f"{what} over {worker.name}": target(found[worker.name]["median"], LEAST_RATIO, at_least=True)
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


def compiled(cache: Path, folder: Path, shape: str, recipe: str) -> Path:
    program = cache / "programs" / f"{shape}-{recipe}"
    if not (program / "manifest.json").exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        note(f"compiling {shape}")
        options = ["--quantize", recipe, "--max-context", "4096"]
        done = subprocess.run([*DOUBLEWEAVE, "compile", str(folder), "-o", str(program), *options])
        if done.returncode:
            raise BenchmarkError(f"{program}: doubleweave compile ended with {done.returncode}")
    return program


if __name__ == "__main__":
    run(main)
