"""Distances between logits, and between the outputs of a segment. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

_PIECE = 1 << 18  # numbers that are made float64 at once: logits of a long prompt are hundreds of MiB


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a part of the largest wanted number; infinite where one is NaN or infinite."""
    off = 0.0
    for a, b in _pieces(found, wanted):
        largest = float((a - b).abs().max())
        if not math.isfinite(largest):
            return math.inf
        off = max(off, largest)
    return off / max(_largest(wanted), 1e-30)


def first_row_over(found: Tensor, wanted: Tensor, bounds: Tensor) -> int | None:
    """The first row that is further off than its bound, float [rows], a part of the largest wanted number."""
    largest, at = _largest(wanted), 0
    for a, b in _pieces(found, wanted):
        over = ~((a - b).abs().reshape(len(a), -1).amax(1) <= bounds[at : at + len(a)] * largest)
        if bool(over.any()):
            return at + int(over.double().argmax())
        at += len(a)
    return None


def noise(found: Tensor, wanted: Tensor) -> float:
    """The root of the mean square of the difference, over that of the wanted numbers; infinite where one is NaN or
    infinite and the other is not the same."""
    size = off = 0.0
    for a, b in _pieces(found, wanted):
        size += float(b.masked_fill((a == b) & b.isinf(), 0).square().sum())
        off += float((a - b).masked_fill(a == b, 0).square().sum())
    ratio = off / size if size else off / max(1, wanted.numel())
    return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


def agreement(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(rows with the same largest logit, as a part of all; mean Kullback-Leibler divergence from wanted, in nats)."""
    same = divergence = 0.0
    for a, b in _pieces(found, wanted):
        same += float((a.argmax(1) == b.argmax(1)).double().sum())
        p, q = b.log_softmax(1), a.log_softmax(1)
        divergence += float((p.exp() * (p - q)).sum())
    return same / len(wanted), divergence / len(wanted)


def _pieces(found: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float64, a few rows at a time."""
    found, wanted = (tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1) for tensor in (found, wanted))
    step = max(1, _PIECE // max(1, wanted.shape[1]))
    for start in range(0, len(wanted), step):
        yield found[start : start + step].double(), wanted[start : start + step].double()


def _largest(wanted: Tensor) -> float:
    low, high = wanted.aminmax()
    return max(abs(float(low)), abs(float(high)))
