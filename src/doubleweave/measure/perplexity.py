"""Score texts: how likely a program finds their tokens, and how far its next tokens are from another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from doubleweave.errors import InputError
from doubleweave.ir.text_score import TextScore
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Session

# Gives the logits of so many tokens at a time, float32 [T, vocab] each, of a text that begins with these ids.
Logits = Callable[[Sequence[int], int], Iterator[Any]]
_ROWS = 32  # of logits, converted to float64 at a time


def score(
    program: Program, session: Session, text: str, name: str = "text", exact: Session | None = None
) -> TextScore:
    """Score a text; `exact` is a session of the float32 program, whose logits are compared with.

    A text longer than the context is cut into windows of the context's length, scored on their own.
    Raises InputError for a text of fewer than two tokens.
    """
    sessions = (session,) if exact is None else (session, exact)
    window = min(each.max_context for each in sessions)
    step = min(each.score_rows for each in sessions)
    return score_text(name, program.text.encode_raw(text), window, step, *map(logits_of, sessions))


def check_exact(program: Program, other: Program, name: str) -> None:
    """Raises InputError where the program `other`, called `name`, is not the same model in float32."""
    if other.model.quantize != "none":
        raise InputError(
            f"against: {name} is compiled with --quantize {other.model.quantize}; expected --quantize none"
        )
    tokens = [each.manifest.tokenizer_digest for each in (program, other)]
    sizes = [each.model.vocab_size for each in (program, other)]
    if tokens[0] != tokens[1] or sizes[0] != sizes[1]:
        raise InputError(
            f"against: {name} has another tokenizer or vocabulary; expected a program of the same model, compiled with "
            "--quantize none"
        )


def logits_of(session: Session) -> Logits:
    def logits(ids: Sequence[int], step: int) -> Iterator[Any]:
        session.reset()
        for at in range(0, len(ids), step):
            yield session.score(np.asarray(ids[at : at + step], dtype=np.int64))

    return logits


def score_text(
    name: str, ids: Sequence[int], window: int, step: int, found: Logits, exact: Logits | None = None
) -> TextScore:
    """Score token ids in windows of so many, each on its own, `step` of them at a time. InputError for fewer than two.

    Both `found` and, where it is given, `exact` are asked in step, so that only a few rows of logits are ever there.
    """
    if len(ids) < 2:
        raise InputError(f"{name}: found {len(ids)} tokens, expected at least 2")
    sums = np.zeros(4)
    for begin in range(0, len(ids) - 1, window):
        # One token more than the window: the last one is only predicted, not read.
        some = ids[begin : begin + window + 1]
        at = 0
        others = None if exact is None else exact(some[:-1], step)
        for logits in found(some[:-1], step):
            targets = np.asarray(some[at + 1 : at + 1 + len(logits)])
            wanted = None if others is None else next(others)
            for row in range(0, len(logits), _ROWS):
                part = slice(row, row + _ROWS)
                sums += _sums(logits[part], targets[part], None if wanted is None else wanted[part])
            at += len(logits)
    count = len(ids) - 1
    nll, exact_nll, kl, top1 = (float(each) for each in sums / count)
    return TextScore(name, count, nll) if exact is None else TextScore(name, count, nll, exact_nll, kl, top1)


def _sums(logits: Any, targets: Any, wanted: Any | None) -> Any:
    """Of some rows: the negative log likelihoods, those of `wanted`, the divergences from it, and equal next tokens."""
    rows = np.arange(len(targets))
    found = _log_probabilities(logits)
    nll = -found[rows, targets].sum()
    if wanted is None:
        return np.array([nll, 0.0, 0.0, 0.0])
    exact = _log_probabilities(wanted)
    divergence = (np.exp(exact) * (exact - found)).sum()
    same = (logits.argmax(axis=1) == wanted.argmax(axis=1)).sum()
    return np.array([nll, -exact[rows, targets].sum(), divergence, same])


def _log_probabilities(logits: Any) -> Any:
    # The largest logit is taken out first, so that exp does not overflow.
    rest = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return rest - np.log(np.exp(rest).sum(axis=1, keepdims=True))
