"""How well a program predicts a text, and how far it is from float32 there: a record of the manifest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextScore:
    """`nll` is the mean negative log likelihood of a token given those before it, in nats, over so many tokens.

    Against float32, None where nothing was compared: `exact_nll` is its own, `kl` the mean Kullback-Leibler divergence
    of the next token, in nats, `top1` the part of next tokens that are the same.
    """

    text: str
    num_tokens: int
    nll: float
    exact_nll: float | None = None
    kl: float | None = None
    top1: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    @property
    def over(self) -> float | None:
        """Perplexity over float32's: 0.01 is one percent more."""
        return None if self.exact_nll is None else math.expm1(self.nll - self.exact_nll)


def together(text: str, scores: Sequence[TextScore]) -> TextScore:
    """The score of several texts as of one."""
    total = sum(score.num_tokens for score in scores)

    def mean(name: str) -> float | None:
        values: list[float | None] = [getattr(score, name) for score in scores]
        parts = [
            value * score.num_tokens for value, score in zip(values, scores, strict=True) if value is not None
        ]
        return sum(parts) / total if len(parts) == len(scores) else None

    return TextScore(text, total, mean("nll") or 0.0, mean("exact_nll"), mean("kl"), mean("top1"))
