"""Choose the segments that keep 8 bits so that perplexity rises by no more than a budget.

Segments are ordered by their noise in 4 bits, the worst first; as few of them as hold the budget get more bits. What is
measured is the quantized split in eager torch on the calibration text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.errors import PolicyError


def within_budget(
    exact: TorchSplit,
    narrow: TorchSplit,
    make_wide: Callable[[], TorchSplit],
    snr: Mapping[str, float],
    chunks: Sequence[Tensor],
    budget: float,
    report: Callable[[str], None],
) -> TorchSplit:
    """The split `narrow` with as few segments in more bits as hold the budget, of those in `snr`, in decibels each.

    `make_wide` gives the split that has them all so, and is called where `narrow` is over the budget. `chunks` are
    token ids, int64 [1, T] each, of one text. Raises PolicyError where the wide split is over the budget as well.
    """
    wanted = _loss(exact, chunks)
    worst_first = sorted(snr, key=snr.__getitem__)

    def rise(torch_split: TorchSplit, count: int) -> float:
        found = math.expm1(_loss(torch_split, chunks) - wanted)
        report(f"{found:+.1%} with {count} of {len(worst_first)} segments in 8 bits")
        return found

    if rise(narrow, 0) <= budget:
        return narrow
    wide = make_wide()

    def first(count: int) -> TorchSplit:
        return mixed(narrow, wide, worst_first[:count])

    low, high = 0, len(worst_first)  # over the budget, and within it
    if (least := rise(first(high), high)) > budget:
        raise PolicyError(
            f"budget: found {budget:g}, but with all of these segments in 8 bits perplexity rises by {least:.1%}; "
            f"expected at least {least:.3f}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rise(first(middle), middle) <= budget else (middle, high)
    return first(high)


def mixed(narrow: TorchSplit, wide: TorchSplit, names: Collection[str]) -> TorchSplit:
    """The split `narrow`, with the named segments as `wide` has them."""
    of = {segment.name: wide if segment.name in names else narrow for segment in narrow.split.segments}
    segments = tuple(found.split.segment(name) for name, found in of.items())
    graphs = {s.structure: of[s.name].graphs[s.structure] for s in segments}
    weights = {name: found.weights[name] for name, found in of.items()}
    return replace(narrow, split=replace(narrow.split, segments=segments), graphs=graphs, weights=weights)


def _loss(torch_split: TorchSplit, chunks: Sequence[Tensor]) -> float:
    """The mean negative log likelihood of each token given those before it, in nats."""
    logits = run_chunks(torch_split, chunks)
    ids = torch.cat(list(chunks), dim=1)[0]
    total, at = 0.0, 0
    for rows in logits:
        targets = ids[at + 1 : at + 1 + rows.shape[1]]
        found = rows[0, : len(targets)].log_softmax(dim=-1)
        total -= float(found.gather(1, targets[:, None]).double().sum())
        at += rows.shape[1]
    return total / (len(ids) - 1)
