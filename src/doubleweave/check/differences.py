"""Distances between logits, and between the outputs of a segment. Knows nothing of models."""

from __future__ import annotations

import math

from torch import Tensor


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a part of the largest wanted number; infinite where one is NaN or infinite."""
    off = float((found.double() - wanted.double()).abs().max())
    largest = float(wanted.double().abs().max())
    return off / max(largest, 1e-30) if math.isfinite(off) else math.inf


def first_row_over(found: Tensor, wanted: Tensor, bound: float) -> int:
    """The first row that is further off than the bound; there is one."""
    rows = (found.double() - wanted.double()).abs().reshape(len(found), -1).amax(1)
    return int((~(rows <= bound * float(wanted.double().abs().max()))).double().argmax())


def noise(found: Tensor, wanted: Tensor) -> float:
    """The root of the mean square of the difference, over that of the wanted numbers."""
    size = float(wanted.double().square().mean())
    off = float((found.double() - wanted.double()).square().mean())
    return math.sqrt(off / size) if size else math.sqrt(off)


def agreement(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(rows with the same largest logit, as a part of all; mean Kullback-Leibler divergence from wanted, in nats)."""
    same = float((found.argmax(1) == wanted.argmax(1)).double().mean())
    p, q = wanted.double().log_softmax(1), found.double().log_softmax(1)
    return same, float((p.exp() * (p - q)).sum(1).mean())
