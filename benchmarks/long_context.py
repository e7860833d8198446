"""A context of 131,072 tokens: how long planning its longest prompt takes, what opening reserves, and a run of it all.

Plans are of a program with the calls of Llama 3.2 1B (16 layers), in chunks of 32 and of 128. The run is of two layers
of tiny widths, since attention to 131,072 keys takes a real model an hour here. Weights are random.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, note, parser, run, table, target

CONTEXT = 131_072
MOST_PLAN_MS = 100.0
SCHEDULES = ("sequential", "pipelined", "out_of_order", "wavefront")


def main() -> None:
    args = arguments()
    args.cache.mkdir(parents=True, exist_ok=True)
    rows = [["", "chunks", "tasks", "plan ms", "verify ms", "reserved MB", "committed MB", "run s"]]
    results: dict[str, Any] = {}
    for name, found in (*plans(args).items(), *runs(args).items()):
        texts = [f"{found[key]:,.1f}" if key in found else "" for key in _NUMBERS]
        rows.append([name, f"{found['chunks']:,}", f"{found['tasks']:,}", *texts])
        results[name] = found
    slowest = max(found["plan_ms"] for found in results.values() if "plan_ms" in found)
    planned = target(slowest, MOST_PLAN_MS, at_least=False)
    finish(
        "long_context", [table(rows)], {"context": CONTEXT, "rows": results, "targets": {"plan_ms": planned}}
    )


_NUMBERS = ("plan_ms", "verify_ms", "reserved_mb", "committed_mb", "run_s")


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--rounds", type=int, default=5, metavar="R", help="plans of each kind (default 5)")
    return p.parse_args()


def program_of(name: str, cache: Path, **sizes: int) -> Any:
    """A Llama of such sizes, compiled first if it is missing, and opened."""
    import doubleweave

    folder = cache / "programs" / f"long-{name}"
    if not folder.exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from doubleweave.sources.hugging_face import from_module

        note(f"compiling {name}")
        torch.manual_seed(0)
        config = LlamaConfig(
            **sizes, max_position_embeddings=CONTEXT, vocab_size=256, bos_token_id=None, eos_token_id=1
        )
        model = from_module(LlamaForCausalLM(config).eval(), name, None)
        doubleweave.compile_llm(model, folder, quantize="none", chunk=(512,))
    return doubleweave.open(folder)


def plans(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By schedule and chunk: the best of a few plans of a prompt as long as the context."""
    from doubleweave.schedule.choice import Wish

    program = program_of(
        "16-layers",
        args.cache,
        num_hidden_layers=16,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
    )
    planner = program.session().planner
    found = {}
    for schedule in SCHEDULES:
        for chunk in (32, 128):
            plan_s, verify_s = [], []
            for _ in range(args.rounds):
                start = time.perf_counter()
                planned = planner.plan_run(planner.choose(Wish(schedule, 2, None, chunk), CONTEXT), CONTEXT)
                middle = time.perf_counter()
                planned.verified  # noqa: B018  checked when it is asked for
                plan_s.append(middle - start)
                verify_s.append(time.perf_counter() - middle)
            found[f"plan {schedule}, {chunk}"] = {
                "chunks": len(planned.graph.chunks),
                "tasks": len(planned.graph),
                "plan_ms": 1e3 * min(plan_s),
                "verify_ms": 1e3 * min(verify_s),
            }
    return found


def runs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A session opened, and the run of the whole context; logits of two chunkings must agree."""
    program = program_of(
        "2-layers",
        args.cache,
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
    )
    ids = np.random.default_rng(0).integers(2, 256, CONTEXT)
    found, logits = {}, []
    for schedule, chunk in (("sequential", 512), ("wavefront", 256)):
        session = program.session(schedule, chunk=chunk)
        reserved = sum(region.nbytes for region in session._cache_regions.values())
        opened = {"reserved_mb": reserved / 1e6, "committed_mb": session.kv_bytes / 1e6}
        start = time.perf_counter()
        logits.append(session.append(ids))
        took = {"committed_mb": session.kv_bytes / 1e6, "run_s": time.perf_counter() - start}
        sizes = {"chunks": -(-CONTEXT // chunk), "tasks": session_tasks(session)}
        found[f"opened {schedule}, {chunk}"] = sizes | opened
        found[f"run {schedule}, {chunk}"] = sizes | took
    assert np.allclose(*logits, atol=1e-4 * np.abs(logits[0]).max()), "two chunkings gave other logits"
    return found


def session_tasks(session: Any) -> int:
    (prepared,) = session._prepared.values()
    return len(prepared.verified.graph)


if __name__ == "__main__":
    run(main)
