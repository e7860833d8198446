"""Perplexity of a text, computed through the prefill path."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from doubleweave.errors import InputError
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Session


def score(program: Program, session: Session, text: str) -> dict[str, Any]:
    """Score a text: `perplexity` is exp of `nll`, the mean negative log likelihood of a token given those before it.

    A text longer than the context is cut into windows of the context's length, scored on their own.
    Raises InputError for a text of fewer than two tokens.
    """
    ids = program.text.encode_raw(text)
    if len(ids) < 2:
        raise InputError(f"text: found {len(ids)} tokens, expected at least 2")
    total, count = 0.0, 0
    start = time.perf_counter()
    for begin in range(0, len(ids) - 1, session.max_context):
        # One token more than the context: the last one is only predicted, not read.
        window = np.asarray(ids[begin : begin + session.max_context + 1], dtype=np.int64)
        session.reset()
        step = session.score_rows
        for at in range(0, len(window) - 1, step):
            targets = window[at + 1 : at + step + 1]
            logits = session.score(window[at : at + len(targets)])
            total += _negative_log_likelihood(logits, targets)
            count += len(targets)
    seconds = time.perf_counter() - start
    return {
        "perplexity": math.exp(total / count),
        "nll": total / count,
        "tokens": count,
        "tok_per_s": count / seconds,
        "schedule": session.schedule,
        "threads": session.threads,
    }


def _negative_log_likelihood(logits: Any, targets: Any) -> float:
    # The largest logit is taken out first, so that exp does not overflow.
    largest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest, dtype=np.float64).sum(axis=1)) + largest[:, 0]
    return float((log_sum - logits[np.arange(len(targets)), targets]).sum())
