"""`wavefront` on one-thread workers against `sequential` on one thread and on as many.

Three processes take turns on the same prompts, paired by round. Then a fresh process opens the program and
prefills once, and its growth in resident memory is compared with the weights and the reported buffers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import Prompts, finish, note, parser, program_folder, run, spread, table, target
from workers import Contest, Entrant, Worker, Workers

SPEEDUP_TARGET, MEMORY_TARGET = 1.7, 1.25


def main() -> None:
    args = arguments()
    program = program_folder(args)
    prompts = Prompts(program)
    with Workers(args.cache / "logs") as workers:
        memory = resident(
            workers.start("resident", *worker(program, "wavefront", args.threads)), prompts, args
        )
        memory |= {"weights": weights(program)}
        contest = Contest(
            {
                name: Entrant(workers.start(name.replace(" ", "-"), *worker(program, schedule, threads)))
                for name, schedule, threads in (
                    ("wavefront", "wavefront", args.threads),
                    ("sequential 1", "sequential", 1),
                    (f"sequential {args.threads}", "sequential", args.threads),
                )
            },
            lambda: prompts.take(args.prompt_len),
            gen=0,
        )
        contest.run(args.rounds, args.warmup)
    lines, result = speed(contest, args)
    more_lines, more = memory_report(memory)
    finish("overlap", [*lines, "", *more_lines], {**result, "memory": more})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--prompt-len", type=int, default=1024, metavar="N", help="prompt tokens (default 1024)")
    p.add_argument("--rounds", type=int, default=9, metavar="R", help="measured rounds (default 9)")
    p.add_argument("--warmup", type=int, default=2, metavar="R", help="rounds before them (default 2)")
    return p.parse_args()


def worker(program: Path, schedule: str, threads: int) -> list[str]:
    return ["serve_doubleweave.py", str(program), "--schedule", schedule, "--threads", str(threads)]


def speed(contest: Contest, args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    rows = [["schedule and threads", "prefill tok/s", "wavefront is faster by"]]
    ratios, rates = {}, {}
    for name, entrant in contest.entrants.items():
        rates[name] = spread([args.prompt_len / seconds for seconds in entrant.prefill_s])
        ratios[name] = spread(contest.ratios("wavefront", name))
        rate = f"{rates[name].median:.0f} [{rates[name].low:.0f}, {rates[name].high:.0f}]"
        rows.append([name, rate, "-" if name == "wavefront" else str(ratios[name])])
    goal = target(ratios["sequential 1"].median, SPEEDUP_TARGET, at_least=True)
    others = contest.other_cpu
    lines = [
        f"{args.prompt_len} prompt tokens, {args.rounds} rounds; medians [interval, "
        f"{ratios['sequential 1'].coverage:.0%}], paired by round",
        table(rows),
        f"target: wavefront over sequential 1 at least {SPEEDUP_TARGET}: {goal['value']:.2f}, "
        + ("met" if goal["met"] else "not met"),
        f"other processes used {statistics.median(others):.0%} of the machine (median), {max(others):.0%} at most",
    ]
    return lines, {
        "prompt_tokens": args.prompt_len,
        "threads": args.threads,
        "rounds": args.rounds,
        "prefill_tok_per_s": {name: value._asdict() for name, value in rates.items()},
        "wavefront_over": {n: v._asdict() for n, v in ratios.items() if n != "wavefront"},
        "target": goal,
        "other_cpu": others,
    }


def resident(process: Worker, prompts: Prompts, args: argparse.Namespace) -> dict[str, Any]:
    """What a fresh process holds after one prefill as a wavefront, and what it held before opening."""
    note(f"memory of a fresh process over one prefill of {args.prompt_len} tokens")
    process.ask("prefill_decode", ids=prompts.take(args.prompt_len), gen=0)
    found = process.ask("memory")
    process.close()
    return found


def weights(program: Path) -> dict[str, int]:
    """Weight bytes of the manifest: `packed` are those of segments that a delegate computes (XNNPACK keeps its
    own copy of them); `mapped` those of segments without one (the embedding table), of which only the rows
    that the prompt touches are read from the mapped file."""
    segments = json.loads((program / "manifest.json").read_text())["split"]["segments"]
    result = {"packed": 0, "mapped": 0}
    for segment in segments:
        result["packed" if segment["num_delegated"] else "mapped"] += segment["weight_bytes"]
    return result


def memory_report(memory: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    before, now = memory["before_opening"], memory["now"]
    growth = {kind: now[kind] - before[kind] for kind in ("rss", "anon", "file", "shmem")}
    counted = memory["weights"]["packed"] + memory["buffer_bytes"] + memory["kv_bytes"]
    # The words: at most 1.25 times the quantised weights, plus the reported buffers.
    allowed = MEMORY_TARGET * memory["weights"]["packed"] + memory["buffer_bytes"] + memory["kv_bytes"]
    over_weights = (growth["rss"] - memory["buffer_bytes"] - memory["kv_bytes"]) / memory["weights"]["packed"]
    goal = target(over_weights, MEMORY_TARGET, at_least=False)

    def mib(size: float) -> str:
        return f"{size / 2**20:.1f}"

    rows = [
        ["memory", "MiB"],
        ["quantised weights of the delegated segments", mib(memory["weights"]["packed"])],
        ["embedding table (mapped file, not counted)", mib(memory["weights"]["mapped"])],
        ["buffers between segments", mib(memory["buffer_bytes"])],
        ["KV cache", mib(memory["kv_bytes"])],
        ["growth of resident memory since before opening", mib(growth["rss"])],
        ["  of it anonymous", mib(growth["anon"])],
        ["  of it pages of files", mib(growth["file"])],
        [f"allowed: {MEMORY_TARGET} x weights + buffers + KV cache", mib(allowed)],
    ]
    lines = [
        table(rows),
        f"target: (growth - buffers - KV cache) / weights at most {MEMORY_TARGET}: {over_weights:.2f}, "
        + ("met" if goal["met"] else "not met"),
    ]
    return lines, {
        "before_opening": before,
        "after_prefill": now,
        "growth": growth,
        "weight_bytes": memory["weights"],
        "buffer_bytes": memory["buffer_bytes"],
        "kv_bytes": memory["kv_bytes"],
        "counted_bytes": counted,
        "target": goal,
    }


if __name__ == "__main__":
    run(main)
