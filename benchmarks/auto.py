"""`auto` against every fixed schedule, over a grid of prompt lengths.

One process runs all of them in turn, paired by round: `auto` follows the decisions of the program's profile (measured
first where the folder has none of this machine); the fixed ones use the same cores.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from common import Prompts, finish, note, parser, program_folder, run, spread, table, target
from own_profile import own_profile

import doubleweave as dw
from doubleweave.predict.planner import simulate
from doubleweave.runtime.llm.session import Session
from doubleweave.schedule.choice import default_choice
from doubleweave.schedule.makers import MAKERS

GRID = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
SLOWER = 1.03


def main() -> None:
    args = arguments()
    folder = program_folder(args)
    own_profile(folder, args.threads)
    program, prompts = dw.open(folder), Prompts(folder)
    sessions = fixed(program, args.threads) | {"auto": program.session(threads=args.threads)}
    results = [at_length(program, sessions, prompts, length, args.rounds) for length in args.prompt_len]
    rows = [["tokens", *sessions, "auto runs", "best fixed", "auto takes"]]
    for found in results:
        rows.append([
            str(found["prompt_tokens"]), *(f"{found['ms'][name]:.1f}" for name in sessions), found["chose"],
            "the same" if found["is_best"] else found["best"], f"{found['auto_over_best']['median']:.3f}",
        ])  # fmt: skip
    others = [found["auto_over_best"]["median"] for found in results if not found["is_best"]]
    noise = [found["auto_over_best"]["median"] for found in results if found["is_best"]]
    worst = max(others, default=1.0)
    should = [found for found in results if found["should_beat_sequential"]]
    does = [found for found in should if found["auto_over_sequential"]["median"] < 1]
    goals = {
        "auto over the best fixed choice where they differ, largest median": target(
            worst, SLOWER, at_least=False
        ),
        "lengths at which auto beats sequential, of those it should": target(
            len(does), len(should), at_least=True
        ),
    }
    lines = [
        f"ms for a prompt, medians of {args.rounds} rounds; the last column is the median of the rounds' ratios",
        table(rows),
        f"where auto runs what the best fixed one does, the ratios are {min(noise, default=1.0):.3f} to "
        f"{max(noise, default=1.0):.3f}",
        *(
            f"{name}: {goal['value']:.3f}, {'met' if goal['met'] else 'not met'}"
            for name, goal in goals.items()
        ),
    ]
    finish(
        "auto", lines, {"program": folder.name, "rounds": args.rounds, "lengths": results, "targets": goals}
    )


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--prompt-len", type=int, nargs="+", default=GRID, metavar="N", help="prompt tokens")
    p.add_argument("--rounds", type=int, default=9, metavar="R", help="measured rounds (default 9)")
    return p.parse_args()


def fixed(program: dw.Program, threads: int) -> dict[str, Session]:
    return {
        **{name: program.session(name, threads) for name in MAKERS},
        "sequential x1": program.session("sequential", 1),
    }


def at_length(
    program: dw.Program, sessions: dict[str, Session], prompts: Prompts, length: int, rounds: int
) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    order = random.Random(length)
    # Short prompts are asked for several times a round: a single one is over before the machine has settled.
    repeats = max(1, 1024 // length)
    for number in range(rounds + 1):
        ids = prompts.take(length)
        for name in order.sample(list(sessions), len(sessions)):
            found = []
            for _ in range(repeats):
                sessions[name].reset()
                begin = time.perf_counter()
                sessions[name].append(ids, record=number == 0)
                found.append(time.perf_counter() - begin)
            if number:
                seconds[name].append(statistics.median(found))
    note(
        f"{length} tokens: "
        + ", ".join(f"{n} {statistics.median(s) * 1e3:.1f} ms" for n, s in seconds.items())
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in sessions if name != "auto"), key=lambda name: medians[name])
    auto = sessions["auto"]
    ran = {
        name: session.recorded.choice for name, session in sessions.items() if session.recorded is not None
    }
    choice = ran["auto"]
    plain = default_choice(program.split, "sequential", auto.threads)
    chosen_s, plain_s = (simulate(auto.planner, c, length).end_ns.max() for c in (choice, plain))
    return {
        "prompt_tokens": length,
        "chose": f"{choice.schedule} {len(choice.workers)}x{choice.threads}, chunk {choice.chunk}",
        "best": best,
        # The best fixed one may be what auto runs; then what is between them is noise.
        "is_best": choice == ran[best],
        "ms": {name: value * 1e3 for name, value in medians.items()},
        "auto_over_best": ratio(seconds["auto"], seconds[best]),
        "auto_over_sequential": ratio(seconds["auto"], seconds["sequential"]),
        "should_beat_sequential": bool(chosen_s < plain_s),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])._asdict()


if __name__ == "__main__":
    run(main)
