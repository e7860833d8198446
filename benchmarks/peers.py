"""Prefill and decode against llama.cpp and OpenVINO GenAI on the same weights, in alternating rounds.

Each engine is a process of its own that loads once. In every round each of them gets the same token ids in
turn while the others are stopped; the ratios are taken within a round, and their median is reported with its
interval. Peers are installed on first use (llama.cpp is built from source: some minutes).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peer_env
from common import (
    BenchmarkError,
    Prompts,
    Spread,
    finish,
    note,
    parser,
    program_folder,
    run,
    smollm2_gguf,
    spread,
    table,
    target,
)
from workers import Contest, Entrant, Workers

OURS = "doubleweave"
N_UBATCH = (128, 256, 512)
PREFILL_TARGETS = {"llama.cpp (its faster)": 2.2, "openvino-int8": 1.0}
DECODE_TARGETS = {"llama-q8_0": 1.0}
TARGET_PROMPT = 512

Start = Callable[[argparse.Namespace, Workers, int], Entrant]


def start_llama(kind: str, name: str = "smollm2", source: Callable[[], Path] = smollm2_gguf) -> Start:
    """llama.cpp over the weights of the file `source`, which are kept under that name, as `kind`."""

    def start(args: argparse.Namespace, workers: Workers, context: int) -> Entrant:
        gguf = peer_env.requantised_gguf(args.cache, source(), kind, name)
        sizes = [text for size in N_UBATCH for text in ("--n-ubatch", str(size))]
        arguments = [str(gguf), "--threads", str(args.threads), "--context", str(context), *sizes]
        python = peer_env.llama_cpp(args.cache)
        worker = workers.start(f"llama-{kind.lower()}", "serve_llama_cpp.py", *arguments, python=python)
        return Entrant(worker, variants=[{"n_ubatch": size} for size in N_UBATCH])

    return start


def start_ours(args: argparse.Namespace, workers: Workers, program: Path, name: str = OURS) -> Entrant:
    options = ["--schedule", args.schedule, "--threads", str(args.threads)]
    return Entrant(workers.start(name, "serve_doubleweave.py", str(program), *options))


def start_openvino(args: argparse.Namespace, workers: Workers, context: int) -> Entrant:
    folder = peer_env.openvino_int8(args.cache, smollm2_gguf())
    python = peer_env.openvino(args.cache)
    arguments = [str(folder), "--threads", str(args.threads)]
    return Entrant(workers.start("openvino-int8", "serve_openvino.py", *arguments, python=python))


PEERS: dict[str, Start] = {
    "llama-q8_0": start_llama("Q8_0"),
    "llama-q4_0": start_llama("Q4_0"),
    "openvino-int8": start_openvino,
}


def main() -> None:
    args = arguments()
    program = program_folder(args)
    lengths = args.prompt_len or [TARGET_PROMPT]
    with Workers(args.cache / "logs") as workers:
        entrants = {OURS: start_ours(args, workers, program)}
        skipped = start_peers(args, workers, entrants, max(lengths) + args.gen + 8)
        prompts = Prompts(program)
        lines, results = [], []
        for length in lengths:
            note(f"{length} prompt tokens, {args.gen} decoded, {args.rounds} rounds")
            contest = Contest(entrants, partial(prompts.take, length), args.gen)
            contest.run(args.rounds, args.warmup)
            result = summarise(contest, length)
            results.append(result)
            lines += [*report(result, args), ""]
        made_with = {name: entrant.worker.ready for name, entrant in entrants.items()}
    lines += [f"skipped: {name}: {reason}" for name, reason in skipped.items()]
    finish("peers", lines, {
        "threads": args.threads, "schedule": args.schedule, "gen": args.gen, "rounds": args.rounds,
        "lengths": results, "skipped": skipped, "made_with": made_with,
    })  # fmt: skip


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument(
        "--prompt-len", type=int, action="append", metavar="N",
        help=f"prompt tokens; may be repeated (default {TARGET_PROMPT})",
    )  # fmt: skip
    add_contest(p)
    p.add_argument(
        "--peer",
        action="append",
        choices=sorted(PEERS),
        help="only this peer; may be repeated (default: all)",
    )
    return p.parse_args()


def add_contest(p: argparse.ArgumentParser) -> None:
    """The options of any contest with peers."""
    p.add_argument(
        "--gen", type=int, default=64, metavar="N", help="tokens to decode after each (default 64)"
    )
    p.add_argument("--rounds", type=int, default=9, metavar="R", help="measured rounds (default 9)")
    p.add_argument("--warmup", type=int, default=2, metavar="R", help="rounds before them (default 2)")
    p.add_argument("--schedule", default="wavefront", help="Doubleweave's schedule (default wavefront)")
    p.add_argument(
        "--warn-other-cpu", type=float, default=5.0, metavar="PERCENT",
        help="warn when other processes take more of the machine than this in a round (default 5)",
    )  # fmt: skip


def start_peers(
    args: argparse.Namespace, workers: Workers, entrants: dict[str, Entrant], context: int
) -> dict[str, str]:
    """Start the peers into `entrants`; returns why others are not there."""
    skipped = {}
    for name, start in PEERS.items():
        if args.peer and name not in args.peer:
            skipped[name] = "not asked for (--peer)"
            continue
        try:
            entrants[name] = start(args, workers, context)
        except BenchmarkError as error:
            skipped[name] = str(error)
            note(f"skipped {name}: {error}")
    return skipped


def summarise(contest: Contest, length: int) -> dict[str, Any]:
    """Rates and paired ratios of one prompt length as plain data."""
    engines = {}
    for name, entrant in contest.entrants.items():
        rates = {"prefill": [length / s for s in entrant.prefill_s]}
        if contest.gen:
            rates["decode"] = [contest.gen / s for s in entrant.decode_s]
        engines[name] = {
            **{f"{what}_tok_per_s": spread(values)._asdict() for what, values in rates.items()},
            "variant": entrant.variant,
            "same_first_token": statistics.mean(
                mine[0] == theirs[0]
                for mine, theirs in zip(entrant.tokens, contest.entrants[OURS].tokens, strict=True)
            ),
        }
    peers = [name for name in contest.entrants if name != OURS]
    prefill = {name: spread(contest.ratios(OURS, name)) for name in peers}
    llama = [name for name in peers if name.startswith("llama")]
    if llama:
        # The faster one over all rounds, as a user would pick it.
        prefill["llama.cpp (its faster)"] = prefill[min(llama, key=lambda name: prefill[name].median)]
    decode = {name: spread(contest.ratios(OURS, name, "decode_s")) for name in peers if contest.gen}
    return {
        "prompt_tokens": length,
        "other_cpu": contest.other_cpu,
        "engines": engines,
        "prefill_ratio": {name: value._asdict() for name, value in prefill.items()},
        "decode_ratio": {name: value._asdict() for name, value in decode.items()},
        "targets": targets(prefill, decode) if length == TARGET_PROMPT else {},
    }


def targets(prefill: dict[str, Spread], decode: dict[str, Spread]) -> dict[str, Any]:
    found = {f"prefill over {n}": (prefill[n], t) for n, t in PREFILL_TARGETS.items() if n in prefill}
    found |= {f"decode over {n}": (decode[n], t) for n, t in DECODE_TARGETS.items() if n in decode}
    return {name: target(ratio.median, limit, at_least=True) for name, (ratio, limit) in found.items()}


def report(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    rows = [["engine", "prefill tok/s", "ratio of ours", "decode tok/s", "ratio of ours", "same 1st token"]]
    for name, engine in result["engines"].items():
        cells = [name + "".join(f" {key}={value}" for key, value in engine["variant"].items())]
        for what in ("prefill", "decode"):
            rate, ratio = engine.get(f"{what}_tok_per_s"), result[f"{what}_ratio"].get(name)
            cells.append(
                "-" if rate is None else f"{rate['median']:.0f} [{rate['low']:.0f}, {rate['high']:.0f}]"
            )
            cells.append("-" if ratio is None else str(Spread(**ratio)))
        rows.append([*cells, f"{engine['same_first_token']:.0%}"])
    coverage = result["engines"][OURS]["prefill_tok_per_s"]["coverage"]
    lines = [
        f"{result['prompt_tokens']} prompt tokens, {args.gen} decoded, {args.threads} threads, {args.rounds} rounds; "
        f"medians [interval, {coverage:.0%}]; ratios are Doubleweave over the engine, paired by round",
        table(rows),
    ]
    for name, goal in result["targets"].items():
        verdict = "met" if goal["met"] else "not met"
        lines.append(f"target: {name} at least {goal['at_least']}: {goal['value']:.2f}, {verdict}")
    shares = result["other_cpu"]
    if max(shares) * 100 > args.warn_other_cpu:
        lines.append(
            f"WARNING: other processes used up to {max(shares):.0%} of the machine in a round "
            f"(median {statistics.median(shares):.0%}): measure alone"
        )
    return lines


if __name__ == "__main__":
    run(main)
