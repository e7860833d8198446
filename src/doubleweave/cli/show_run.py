"""Measurements of a run as plain dictionaries (for --json) and as text."""

from __future__ import annotations

from typing import Any

from doubleweave.runtime.llm.generate import Generation
from doubleweave.tables import format_table


def generation_lines(result: Generation) -> list[str]:
    decode = "-" if result.decode_tok_per_s is None else f"{result.decode_tok_per_s:.1f}"
    return [
        f"prompt {result.prompt_tokens} tokens, {result.new_tokens} new; ended by {result.finish}",
        f"first token after {result.ttft_s * 1000:.0f} ms; prefill {result.prefill_tok_per_s:.0f} tokens/s, "
        f"decode {decode} tokens/s",
        f"schedule {result.schedule}, {result.threads} threads; KV cache peak {result.kv_bytes_peak / 2**20:.1f} MiB",
    ]


def bench_lines(result: dict[str, Any]) -> list[str]:
    def row(name: str, key: str) -> list[str]:
        return [name, *(f"{result[key + suffix]:.1f}" for suffix in ("", "_min", "_max"))]

    rows = [["", "median", "min", "max"], row("prefill tokens/s", "prefill_tok_per_s")]
    if result["decode_tok_per_s"] is not None:
        rows.append(row("decode tokens/s", "decode_tok_per_s"))
    busy = ", ".join(f"{seconds * 1e3:.1f}" for seconds in result["busy_s"])
    return [
        f"{result['prompt_tokens']} prompt tokens in {len(result['chunks'])} chunks, {result['new_tokens']} decoded, "
        f"{result['runs']} runs; schedule {result['schedule']} on {','.join(result['workers'])}, "
        f"{result['threads']} threads",
        format_table(rows),
        f"overlap efficiency {result['overlap_efficiency']:.3f}: lower bound {result['lower_bound_s'] * 1e3:.1f} ms, "
        f"makespan {result['makespan_s'] * 1e3:.1f} ms; workers busy {busy} ms",
        f"prefill makespan {result['makespan_s'] * 1000:.1f} ms, first token after "
        f"{result['ttft_s'] * 1000:.1f} ms; KV cache {result['kv_bytes_peak'] / 2**20:.1f} MiB, "
        f"buffers {result['buffer_bytes'] / 2**20:.1f} MiB",
    ]
