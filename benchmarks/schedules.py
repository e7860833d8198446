"""Schedules: how much they overlap, and whether the simulator told it beforehand.

One process runs every schedule in turn on the same prompts. Overlap efficiency is the lower bound over the makespan,
the bound from each task's median time when it runs alone (`sequential` on one thread, in the same rounds). Simulated
times come from the program's profile, which is measured first unless the folder has one of this machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import Prompts, compiled, finish, note, parser, run, table, target
from own_profile import own_profile

import doubleweave as dw
from doubleweave.measure.waits import waits_of
from doubleweave.predict.planner import hidden_share, simulate
from doubleweave.runtime.llm.session import Session
from doubleweave.schedule.costs import Costs, lower_bound_ns

EFFICIENCY = {"out_of_order": 0.90, "wavefront": 0.93}
AT = (1024, 4096)
ERROR, HAND_OVER_US, SAME_WORKER_US = 0.08, 10.0, 3.0


@dataclass
class Entrant:
    session: Session
    makespan_s: list[float] = field(default_factory=list)
    took: list[Any] = field(default_factory=list)
    hand_over_ns: list[int] = field(default_factory=list)
    same_worker_ns: list[int] = field(default_factory=list)


def main() -> None:
    args = arguments()
    folder = args.static_program or compiled(
        args.cache / "programs" / "smollm2-8da8w-static", "--shape", "static"
    )
    own_profile(folder, args.threads, "--quick")
    program = dw.open(folder)
    prompts = Prompts(folder)
    found = {length: measure(program, prompts, length, args) for length in args.prompt_len}
    lines, lengths = [], []
    for length, entrants in found.items():
        rows, result = report(program, length, entrants)
        lines += [f"{length} tokens, {args.rounds} rounds", table(rows), ""]
        lengths.append(result)
    goals = targets(lengths)
    lines += [
        f"{name}: {goal['value']:.3f}, {'met' if goal['met'] else 'not met'}" for name, goal in goals.items()
    ]
    finish(
        "schedules",
        lines,
        {"program": folder.name, "rounds": args.rounds, "lengths": lengths, "targets": goals},
    )


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument(
        "--static-program", type=Path, metavar="DIR",
        help="an 8da8w program of SmolLM2 with fixed sizes (default: in the cache folder, compiled if missing)",
    )  # fmt: skip
    p.add_argument(
        "--prompt-len", type=int, nargs="+", default=[256, 1024, 4096], metavar="N", help="prompt tokens"
    )
    p.add_argument("--rounds", type=int, default=7, metavar="R", help="measured rounds (default 7)")
    return p.parse_args()


def sessions(program: dw.Program, threads: int) -> dict[str, Session]:
    """Every schedule, one thread a worker: an NPU's worker and a CPU's where devices are apart."""
    both = ("npu", "cpu")
    one_each = {
        name: program.session(name, threads, workers=both)
        for name in ("lockstep", "pipelined", "out_of_order")
    }
    return {
        "sequential": program.session("sequential", 1),
        **one_each,
        "wavefront": program.session("wavefront", threads, workers=("any", "any")),
    }


def measure(
    program: dw.Program, prompts: Prompts, length: int, args: argparse.Namespace
) -> dict[str, Entrant]:
    entrants = {name: Entrant(session) for name, session in sessions(program, args.threads).items()}
    for number in range(args.rounds + 1):
        ids = prompts.take(length)
        for name in list(entrants)[:: -1 if number % 2 else 1]:
            entrant = entrants[name]
            entrant.session.reset()
            entrant.session.append(ids, record=True)
            recorded = entrant.session.recorded
            assert recorded is not None
            if number == 0:
                continue
            waits = waits_of(recorded.verified, recorded.start_ns, recorded.end_ns)
            entrant.makespan_s.append(float(recorded.end_ns.max()) / 1e9)
            entrant.took.append(recorded.end_ns - recorded.start_ns)
            entrant.same_worker_ns += waits.same_worker
            entrant.hand_over_ns += [ns for values in waits.hand_overs.values() for ns in values]
        note(f"{length} tokens, round {number}/{args.rounds}")
    return entrants


def report(
    program: dw.Program, length: int, entrants: dict[str, Entrant]
) -> tuple[list[list[str]], dict[str, Any]]:
    alone = np.median(entrants["sequential"].took, axis=0).astype(np.int64)
    medians = {name: statistics.median(entrant.makespan_s) for name, entrant in entrants.items()}
    rows = [
        ["schedule", "workers", "ms", "min", "max", "bound ms", "efficiency", "x sequential", "x lockstep",
         "simulated", "off by", "CPU hidden", "hand-over us", "same worker us"],
    ]  # fmt: skip
    results = []
    for name, entrant in entrants.items():
        recorded = entrant.session.recorded
        assert recorded is not None
        graph, schedule = recorded.verified.graph, recorded.verified.schedule
        first = entrants["sequential"].session.recorded
        assert first is not None
        if graph.chunks != first.verified.graph.chunks:
            raise AssertionError(f"{name} cuts {length} tokens otherwise")
        bound_ns, bound = lower_bound_ns(graph, schedule.devices, Costs(alone))
        simulated_s = simulate(entrant.session.planner, recorded.choice, length).end_ns.max() / 1e9
        devices = np.array(graph.devices)[graph.call_of]
        work = {device: float(alone[devices == device].sum()) / 1e9 for device in sorted(set(graph.devices))}
        hand_over, same = (median_us(values) for values in (entrant.hand_over_ns, entrant.same_worker_ns))
        result = {
            "schedule": name,
            "workers": list(schedule.devices),
            "chunks": len(graph.chunks),
            "makespan_s": medians[name],
            "makespan_s_all": entrant.makespan_s,
            "lower_bound_s": bound_ns / 1e9,
            "bound": bound,
            "overlap_efficiency": bound_ns / 1e9 / medians[name],
            "over_sequential": medians["sequential"] / medians[name],
            "over_lockstep": medians["lockstep"] / medians[name],
            "simulated_s": float(simulated_s),
            "error": float(simulated_s) / medians[name] - 1,
            "cpu_hidden": hidden_share(schedule, devices == "cpu", recorded.start_ns, recorded.end_ns),
            "work_s": work,
            "hand_over_us": hand_over,
            "same_worker_us": same,
        }
        results.append(result)
        rows.append([
            name, ",".join(schedule.devices), f"{medians[name] * 1e3:.1f}", f"{min(entrant.makespan_s) * 1e3:.1f}",
            f"{max(entrant.makespan_s) * 1e3:.1f}", f"{bound_ns / 1e6:.1f}", f"{result['overlap_efficiency']:.3f}",
            f"{result['over_sequential']:.2f}", f"{result['over_lockstep']:.2f}", f"{simulated_s * 1e3:.1f}",
            f"{result['error']:+.1%}", f"{result['cpu_hidden']:.0%}", text_us(hand_over), text_us(same),
        ])  # fmt: skip
    return rows, {"prompt_tokens": length, "schedules": results}


def median_us(values: Sequence[int]) -> float | None:
    return statistics.median(values) / 1e3 if values else None


def text_us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def targets(lengths: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    every = [result for found in lengths for result in found["schedules"]]
    goals = {
        f"overlap efficiency of {result['schedule']} at {found['prompt_tokens']} tokens": target(
            result["overlap_efficiency"], EFFICIENCY[result["schedule"]], at_least=True
        )
        for found in lengths
        if found["prompt_tokens"] in AT
        for result in found["schedules"]
        if result["schedule"] in EFFICIENCY
    }
    goals["simulated makespan, largest distance from the measured one"] = target(
        max(abs(result["error"]) for result in every), ERROR, at_least=False
    )
    for key, name, limit in (
        ("hand_over_us", "hand-over to another worker, largest median, us", HAND_OVER_US),
        ("same_worker_us", "to the next task of a worker, largest median, us", SAME_WORKER_US),
    ):
        goals[name] = target(max(r[key] for r in every if r[key] is not None), limit, at_least=False)
    return goals


if __name__ == "__main__":
    run(main)
