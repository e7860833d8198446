"""Measure a program's prefill and decode: medians with minimum and maximum over runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from doubleweave.errors import InputError
from doubleweave.program import Program
from doubleweave.timeline import Timeline


def bench(
    program: Program,
    schedule: str,
    threads: int | None,
    prompt_len: int,
    gen: int,
    *,
    runs: int = 5,
    token_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """One warm-up and `runs` measured runs of: prefill the prompt, then decode `gen` tokens greedily.

    Rates are in tokens/s; `ttft_s` is from the prompt to the first token, `makespan_s` the prefill's own
    time on the workers. Raises InputError for counts that make no sense and what `Session.append` raises.
    """
    for name, value, least in (("prompt-len", prompt_len, 1), ("gen", gen, 0), ("runs", runs, 1)):
        if value < least:
            raise InputError(f"{name}: found {value}, expected at least {least}")
    vocab = program.model.vocab_size
    ids = token_ids if token_ids is not None else np.random.default_rng(0).integers(0, vocab, prompt_len)
    session = program.session(schedule, threads)
    if len(ids) + gen > session.max_context:
        raise InputError(
            f"context: {len(ids)} prompt and {gen} decoded tokens, expected at most {session.max_context} together"
        )
    ttft, makespan, decode = [], [], []
    timeline = Timeline((), 1)
    for number in range(runs + 1):
        session.reset()
        start = time.perf_counter()
        token = int(np.argmax(session.append(ids, record=True)))
        first = time.perf_counter()
        for _ in range(gen):
            token = int(np.argmax(session.append([token])))
        end = time.perf_counter()
        if number == 0:
            continue  # loads methods, touches memory
        timeline = session.timeline or timeline
        ttft.append(first - start)
        makespan.append(timeline.makespan_s)
        if gen:
            decode.append(gen / (end - first))
    return {
        "schedule": session.schedule,
        "threads": session.threads,
        "prompt_tokens": len(ids),
        "new_tokens": gen,
        "runs": runs,
        "chunks": 1 + max(event.chunk for event in timeline.events),
        **_spread("prefill_tok_per_s", [len(ids) / seconds for seconds in ttft]),
        **_spread("decode_tok_per_s", decode),
        **_spread("ttft_s", ttft),
        **_spread("makespan_s", makespan),
        "busy_s": [timeline.busy_s(w) for w in range(timeline.num_workers)],
        "kv_bytes_peak": session.kv_bytes_peak,
        "buffer_bytes": session.buffer_bytes,
    }


def _spread(name: str, values: list[float]) -> dict[str, float | None]:
    return {
        name: statistics.median(values) if values else None,
        f"{name}_min": min(values, default=None),
        f"{name}_max": max(values, default=None),
    }
