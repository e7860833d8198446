"""Dynamic attention beside static segments, or everything static, or token by token: the same model three ways.

Compiled for SM8650 (16a8w) and simulated on that chip's profile; compiled for XNNPACK (8da8w) with fixed sizes as the
stand-in of an NPU and measured: one thread is the NPU, another one the CPU that attends. All static, there is nothing
for the second; "both cores" gives it to the methods.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Prompts, compiled, finish, note, parser, run, spread, table

import doubleweave as dw
from doubleweave.ir import manifest
from doubleweave.ir.split import Split, whole_cache
from doubleweave.predict.find_profile import find_profile
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.planner import plan
from doubleweave.schedule.choice import chunk_shape
from doubleweave.schedule.chunks import cut

CONTEXTS = (1024, 4096)
LENGTHS = (100, 300, 1000)
WAYS = {
    "mixed": (),
    "all static": ("--attention", "static"),
    "token by token": ("--attention", "static", "--chunk", "1"),
}
SOC = "SM8650"


def main() -> None:
    args = arguments()
    rows = [[
        "context", "prompt", "way", "KV MiB", "attention GOP", "compiled MiB", f"{SOC} ms, simulated",
        "busiest", "CPU at half its peak", "stand-in ms, measured", "both cores ms",
    ]]  # fmt: skip
    results = []
    for context in args.context:
        programs = {way: folders(args.cache, way, context) for way in WAYS}
        opened = {way: dw.open(stand_in) for way, (_, stand_in) in programs.items()}
        prompts = Prompts(next(iter(programs.values()))[1])
        for length in args.prompt_len:
            measured = measure(opened, prompts, length, args.rounds, args.threads)
            for way, (chip, _) in programs.items():
                found = {
                    "context": context, "prompt_tokens": length, "way": way,
                    **count(manifest.read(chip).split, length, context),
                    "program_bytes": (chip / "program.pte").stat().st_size,
                    **predicted(chip, length),
                    **measured[way],
                }  # fmt: skip
                results.append(found)
                rows.append([
                    f"{context:,}", f"{length:,}", way, f"{found['kv_bytes'] / 2**20:.1f}",
                    f"{found['attention_operations'] / 1e9:.1f}", f"{found['program_bytes'] / 2**20:.0f}",
                    f"{found['simulated_s'] * 1e3:.0f}", found["busiest"],
                    f"{found['simulated_fast_cpu_s'] * 1e3:.0f}", text_of(found["stand_in_s"]),
                    text_of(found["both_cores_s"]),
                ])  # fmt: skip
    lines = [
        f"time to the first token's logits; medians of {args.rounds} rounds [interval]",
        table(rows),
        *(verdict(results, context, length) for context in args.context for length in args.prompt_len),
    ]
    finish("all_static", lines, {"soc": SOC, "rounds": args.rounds, "results": results})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--context", type=int, nargs="+", default=CONTEXTS, metavar="N", help="tokens of context")
    p.add_argument("--prompt-len", type=int, nargs="+", default=LENGTHS, metavar="N", help="prompt tokens")
    p.add_argument("--rounds", type=int, default=3, metavar="R", help="measured rounds (default 3)")
    return p.parse_args()


def folders(cache: Path, way: str, context: int) -> tuple[Path, Path]:
    """The programs for the chip and for XNNPACK, compiled if missing; with a growing cache the context is no matter."""
    options = list(WAYS[way])
    name = way.replace(" ", "-")
    if options:
        options += ["--max-context", str(context)]
        name += f"-{context}"
    chip = compiled(
        cache / "programs" / f"smollm2-16a8w-{SOC}-{name}",
        *("--backend", "qnn", "--soc", SOC, "--quantize", "16a8w", *options),
    )
    stand_in = "smollm2-8da8w-static" if way == "mixed" else f"smollm2-8da8w-{name}"
    return chip, compiled(cache / "programs" / stand_in, "--shape", "static", *options)


def count(split: Split, length: int, context: int) -> dict[str, int]:
    """Bytes of the cache and operations of attention for a prompt: over what is cached, or over the whole cache."""
    row_bytes = sum(value.row_bytes for value in split.values if value.kind == "cache")
    chunks = cut(length, chunk_shape(split))
    width = sum(segment.attended_width for segment in split.segments)
    if width:
        whole = max(whole_cache(port) for segment in split.segments for port in segment.inputs)
        return {
            "kv_bytes": context * row_bytes,
            "attention_operations": sum(
                2 * width * c.compiled_size * (whole + c.compiled_size) for c in chunks
            ),
        }
    per_pair = sum(
        4 * int(split.segment(call.segment).inputs[0].shape[2])
        for call in split.calls
        if call.segment.startswith("attention")
    )
    return {
        "kv_bytes": length * row_bytes,
        "attention_operations": sum(
            per_pair * c.num_tokens * (2 * c.start + c.num_tokens + 1) // 2 for c in chunks
        ),
    }


def predicted(folder: Path, length: int) -> dict[str, Any]:
    """On the chip's profile, run as its plan says; and with a CPU that reaches half of its peak: the profile's share of
    it was derived from 8-bit products, and attention is in float32."""
    found = manifest.read(folder)
    profile = find_profile(folder, found, SOC.lower())
    cpu = replace(profile.devices["cpu"], efficiency=0.5)
    faster = replace(profile, devices={**profile.devices, "cpu": cpu})
    planners = [RunPlanner(found.split, p, found.model.max_context) for p in (profile, faster)]
    threads = sum(device.workers or 1 for device in profile.devices.values())
    chosen, other = (plan(planner, length, threads).chosen for planner in planners)
    return {
        "simulated_s": chosen.makespan_s,
        "simulated_fast_cpu_s": other.makespan_s,
        "schedule": chosen.schedule,
        "busiest": chosen.bottleneck,
    }


def measure(
    programs: dict[str, dw.Program], prompts: Prompts, length: int, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """Every way in turn, round by round: as an NPU of one thread and a CPU of one, and with every thread."""
    sessions = {}
    for way, program in programs.items():
        devices = tuple(dict.fromkeys(segment.device for segment in program.split.segments))
        # One worker alone would take every thread.
        sessions[way, "stand_in_s"] = program.session(
            "out_of_order", min(threads, len(devices)), workers=devices
        )
        both = "wavefront" if "cpu" in devices else "sequential"
        sessions[way, "both_cores_s"] = program.session(both, threads)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sessions}
    for number in range(rounds + 1):
        ids = prompts.take(length)
        for key in list(sessions)[:: 1 if number % 2 else -1]:
            # The first round loads methods, for which a few tokens are enough where it goes token by token.
            ids_now = ids[:8] if number == 0 and key[0] == "token by token" else ids
            sessions[key].reset()
            begin = time.perf_counter()
            sessions[key].append(ids_now)
            if number:
                seconds[key].append(time.perf_counter() - begin)
        note(f"{length} tokens, round {number}/{rounds}")
    result: dict[str, dict[str, Any]] = {way: {} for way in programs}
    for (way, what), values in seconds.items():
        result[way][what] = spread(values)._asdict()
    return result


def text_of(found: dict[str, float]) -> str:
    return f"{found['median'] * 1e3:.0f} [{found['low'] * 1e3:.0f}, {found['high'] * 1e3:.0f}]"


def verdict(results: list[dict[str, Any]], context: int, length: int) -> str:
    """Which way is fastest, simulated and measured."""
    here = {r["way"]: r for r in results if (r["context"], r["prompt_tokens"]) == (context, length)}

    def ratio(value: Any) -> str:
        times = {way: value(found) for way, found in here.items()}
        fastest = min(times, key=lambda way: times[way])
        others = ", ".join(
            f"{way} {times[way] / times[fastest]:.2f} times" for way in times if way != fastest
        )
        return f"{fastest} ({others})"

    return (
        f"context {context:,}, {length:,} tokens: fastest on {SOC} {ratio(lambda r: r['simulated_s'])}; "
        f"on the stand-in {ratio(lambda r: r['stand_in_s']['median'])}"
    )


if __name__ == "__main__":
    run(main)
