"""The scores of texts as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from doubleweave.ir.text_score import TextScore, together
from doubleweave.tables import format_table
from doubleweave.texts import CALIBRATION

_HEADER = ("text", "tokens", "perplexity", "over float32", "divergence", "same next tokens")


def score_lines(scores: Sequence[TextScore]) -> list[str]:
    """A line for each text, and one for all that are held out; none without scores."""
    if not scores:
        return []
    # What recipes are calibrated on counts for nothing.
    held_out = [score for score in scores if score.text != CALIBRATION]
    shown = [*scores, together("all held out", held_out)] if len(held_out) > 1 else scores
    rows = [_row(score) for score in shown]
    columns = len(_HEADER) if any(score.kl is not None for score in scores) else 3
    return format_table([each[:columns] for each in (_HEADER, *rows)]).splitlines()


def _row(score: TextScore) -> tuple[str, ...]:
    row = (score.text, str(score.num_tokens), f"{score.perplexity:.3f}")
    if score.over is None:
        return row
    return (*row, f"{score.over:+.2%}", f"{score.kl:.4f}", f"{score.top1:.1%}")


def score_dict(score: TextScore) -> dict[str, Any]:
    return {**asdict(score), "perplexity": score.perplexity, "over": score.over}
