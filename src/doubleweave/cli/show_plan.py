"""Forecasts and plans as text for people and as plain data for --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from doubleweave.predict.planner import Forecast, Plan
from doubleweave.tables import format_table


def plan_dict(found: Plan) -> dict[str, Any]:
    return {
        "prompt_tokens": found.num_tokens,
        **asdict(found.chosen),
        "auto": asdict(found.auto),
        "candidates": [asdict(item) for item in found.candidates],
    }


def forecast_text(found: Forecast) -> str:
    """One simulated run in a few lines."""
    busy = ", ".join(
        f"{device} {seconds * 1e3:.1f}" for device, seconds in zip(found.workers, found.busy_s, strict=True)
    )
    return "\n".join(
        [
            f"{found.schedule} on {','.join(found.workers)}, each with {found.threads} "
            f"thread{'s' if found.threads > 1 else ''}; chunks {chunks_text(found.chunks)}",
            f"makespan {found.makespan_s * 1e3:.1f} ms; lower bound {found.lower_bound_s * 1e3:.1f} ms "
            f"({found.bound}); overlap efficiency {found.overlap_efficiency:.3f}",
            f"busy ms: {busy}; busiest device: {found.bottleneck}; CPU time hidden behind another worker: "
            f"{found.hidden:.0%}",
        ]
    )


def plan_text(found: Plan, limit: int = 10) -> str:
    """The chosen way to run a prompt with its reason, and the candidates as a table."""
    chosen = found.chosen
    plain = next((c for c in found.candidates if c.schedule == "sequential"), None)
    rows = [
        ["schedule", "workers", "threads", "chunks", "ms", "efficiency", "bound", "busiest", "CPU hidden"]
    ]
    rows += [
        [
            ("* " if item == chosen else "  ") + item.schedule,
            ",".join(item.workers),
            str(item.threads),
            chunks_text(item.chunks),
            f"{item.makespan_s * 1e3:.1f}",
            f"{item.overlap_efficiency:.2f}",
            item.bound,
            item.bottleneck,
            f"{item.hidden:.0%}",
        ]
        for item in found.candidates[:limit]
    ]
    against = ""
    if plain is not None and plain != chosen:
        against = f", {plain.makespan_s / chosen.makespan_s:.2f} times as fast as the fastest sequential run"
    lines = [
        f"{found.num_tokens:,} tokens: {chosen.schedule} on {','.join(chosen.workers)}, chunks "
        f"{chunks_text(chosen.chunks)}: {chosen.makespan_s * 1e3:.1f} ms{against}; limited by its {chosen.bound}",
        format_table(rows),
    ]
    if (auto := found.auto) != chosen:
        lines.insert(
            1,
            f"  --schedule auto takes {auto.schedule} on {','.join(auto.workers)}, chunks {chunks_text(auto.chunks)}: "
            f"{auto.makespan_s * 1e3:.1f} ms; doubleweave profile measures which one is faster",
        )
    if (more := len(found.candidates) - limit) > 0:
        lines.append(f"  … and {more} slower ones")
    return "\n".join(lines)


def chunks_text(chunks: Sequence[Sequence[int]]) -> str:
    """Runs of equal chunks: "7x128 1x104@128"."""
    texts = [str(tokens) if tokens == size else f"{tokens}@{size}" for _, tokens, size in chunks]
    return " ".join(f"{len(list(equal))}x{text}" for text, equal in groupby(texts))
