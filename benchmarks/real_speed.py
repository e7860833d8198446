"""Speed at real sizes beside llama.cpp: the same GGUF file of random weights in Q4_0, which both read.

Doubleweave runs the program that it compiles from the file (8da4w). In every round each engine gets the same token ids
in turn while the other is stopped, as in peers.py. Decoding is bound by memory: its share is the bytes of the weights
that a token reads, times tokens a second, over what this machine reads a second (floor_peak.c).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from common import Prompts, compiled, finish, note, parser, run, target
from floor import peaks
from peers import OURS, add_contest, peer_env, report, start_ours, summarise
from real_sizes import OPTIONS, SHAPES, weights_of
from workers import Contest, Entrant, Workers

from doubleweave.ir.manifest import read

DEFAULT_SHAPES = ("llama-1b", "qwen3-4b")
KIND, PEER = "Q4_0", "llama.cpp"
UBATCH = 512
LEAST_PREFILL, LEAST_DECODE, LEAST_SHARE = 1.5, 1.2, 0.8


def main() -> None:
    args = arguments()
    read_bytes = peaks(args)["read_bytes"]
    lines: list[str] = []
    results: dict[str, Any] = {}
    for shape in args.shape or DEFAULT_SHAPES:
        results[shape] = result = measured(args, shape, read_bytes)
        lines += [f"{shape}, 8da4w beside {KIND}", *report(result, args), ""]
    finish("real_speed", lines, {"threads": args.threads, "read_bytes": read_bytes, "shapes": results})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument(
        "--shape",
        action="append",
        choices=list(SHAPES),
        help="may be repeated (default: llama-1b and qwen3-4b)",
    )
    p.add_argument("--prompt-len", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    add_contest(p)
    return p.parse_args()


def measured(args: argparse.Namespace, shape: str, read_bytes: float | None) -> dict[str, Any]:
    gguf = weights_of(shape, args.cache, KIND)
    program = compiled(args.cache / "programs" / f"{shape}-{KIND}-8da4w", *OPTIONS, source=str(gguf))
    with Workers(args.cache / "logs") as workers:
        entrants = {OURS: start_ours(args, workers, program), PEER: start_llama(args, workers, gguf)}
        contest = Contest(entrants, partial(Prompts(program).take, args.prompt_len), args.gen)
        note(f"{shape}: {args.prompt_len} prompt tokens, {args.gen} decoded, {args.rounds} rounds")
        contest.run(args.rounds, args.warmup)
        result = summarise(contest, args.prompt_len)
    goals = {
        f"{what} over {PEER}": target(result[f"{what}_ratio"][PEER]["median"], least, at_least=True)
        for what, least in (("prefill", LEAST_PREFILL), ("decode", LEAST_DECODE))
    }
    if read_bytes:
        rate = result["engines"][OURS]["decode_tok_per_s"]["median"]
        share = rate * bytes_a_token(program) / read_bytes
        goals["share of the memory's bandwidth"] = target(share, LEAST_SHARE, at_least=True)
    return {**result, "targets": goals}


def start_llama(args: argparse.Namespace, workers: Workers, gguf: Path) -> Entrant:
    context = args.prompt_len + args.gen + 8
    arguments = [
        str(gguf),
        "--threads",
        str(args.threads),
        "--context",
        str(context),
        "--n-ubatch",
        str(UBATCH),
    ]
    python = peer_env.llama_cpp(args.cache)
    return Entrant(
        workers.start(PEER, "serve_llama_cpp.py", *arguments, python=python), variants=[{"n_ubatch": UBATCH}]
    )


def bytes_a_token(program: Path) -> int:
    """The weights that each token reads: of a table one row."""
    split = read(program).split
    return sum(
        split.segment(call.segment).weight_bytes for call in split.calls if call.segment != "embed_tokens"
    )


if __name__ == "__main__":
    run(main)
