"""Measure a program's prefill and decode: medians with minimum and maximum over runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from doubleweave.errors import InputError
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Recorded, Session, TokenIds
from doubleweave.schedule.costs import Costs, lower_bound_ns
from doubleweave.schedule.schedule import ANY
from doubleweave.timeline.timeline import Timeline


def bench(
    program: Program,
    session: Session,
    prompt_len: int,
    gen: int,
    *,
    runs: int = 5,
    token_ids: Sequence[int] | None = None,
) -> tuple[dict[str, Any], Timeline]:
    """One warm-up and `runs` measured runs of: prefill the prompt, then decode `gen` tokens greedily; gives the report
    and the timeline of the last prefill.

    Rates are in tokens/s; `ttft_s` is from the prompt to the first token, `makespan_s` the prefill's own time on the
    workers. Each round also runs the same chunks one task at a time: `lower_bound_s` follows from those times, and
    `overlap_efficiency` is the bound over the makespan. Raises InputError for a count below its least and for more
    tokens than the context holds, and the errors of `Session.append`.
    """
    for name, value, least in (("prompt-len", prompt_len, 1), ("gen", gen, 0), ("runs", runs, 1)):
        if value < least:
            raise InputError(f"{name}: found {value}, expected at least {least}")
    vocab = program.model.vocab_size
    ids = token_ids if token_ids is not None else np.random.default_rng(0).integers(0, vocab, prompt_len)
    if len(ids) + gen > session.max_context:
        raise InputError(
            f"context: {len(ids)} prompt and {gen} decoded tokens, expected at most {session.max_context} together"
        )
    ttft, makespan, decode, alone = [], [], [], []
    one_by_one = program.session("sequential", 1)
    for number in range(runs + 1):
        session.reset()
        start = time.perf_counter()
        token = int(np.argmax(session.append(ids, record=True)))
        first = time.perf_counter()
        for _ in range(gen):
            token = int(np.argmax(session.append([token])))
        end = time.perf_counter()
        recorded = session.recorded
        assert recorded is not None
        # In the same round: the machine's speed drifts, and the bound is to be of the speed that the run had.
        took_alone = _alone(one_by_one, recorded, ids)
        if number == 0:
            continue  # the warm-up loads methods and touches memory
        ttft.append(first - start)
        makespan.append(recorded.makespan_s)
        alone.append(took_alone)
        if gen:
            decode.append(gen / (end - first))
    assert recorded is not None
    graph, schedule = recorded.verified.graph, recorded.verified.schedule
    costs = Costs(np.median(alone, axis=0).astype(np.int64))
    bound_s = lower_bound_ns(graph, schedule.devices, costs)[0] / 1e9
    timeline = session.timeline
    assert timeline is not None
    middle = statistics.median(makespan)
    report = {
        "schedule": ": ".join(dict.fromkeys([session.schedule, schedule.name])),
        "workers": list(schedule.devices),
        "threads": session.threads,
        "prompt_tokens": len(ids),
        "new_tokens": gen,
        "runs": runs,
        "chunks": [list(chunk) for chunk in graph.chunks],
        **_spread("prefill_tok_per_s", [len(ids) / seconds for seconds in ttft]),
        **_spread("decode_tok_per_s", decode),
        **_spread("ttft_s", ttft),
        **_spread("makespan_s", makespan),
        "lower_bound_s": bound_s,
        "overlap_efficiency": bound_s / middle,
        "busy_s": [timeline.busy_s(w) for w in range(timeline.num_workers)],
        "kv_bytes_peak": session.kv_bytes_peak,
        "buffer_bytes": session.buffer_bytes,
    }
    return report, timeline


def _alone(session: Session, recorded: Recorded, ids: TokenIds) -> Any:
    """Each task's nanoseconds when one runs at a time."""
    session.use(recorded.choice._replace(schedule="sequential", workers=(ANY,), in_flight=1))
    session.reset()
    alone = session.append_recorded(ids)
    assert alone.verified.graph.chunks == recorded.verified.graph.chunks
    return alone.took_ns


def _spread(name: str, values: list[float]) -> dict[str, float | None]:
    return {
        name: statistics.median(values) if values else None,
        f"{name}_min": min(values, default=None),
        f"{name}_max": max(values, default=None),
    }
