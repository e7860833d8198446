"""Rows of logits that rounding decides: of two experts that a router finds equally good, say, one is taken.

Such a row moves by much in the source itself where its inputs move by as little as another order of summation moves
them. It says nothing about a program. Some models make rounding larger in every row (Gemma 3n's sparse layers, behind
random weights): their programs may be as far off as the source itself moves. Knows nothing of programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doubleweave.check.source_run import Rows, source_logits

# Of each number of an embedding: some times what rounding in float32 adds up to over the layers of a model.
_NOISE = 1e-5
_TRIES = 4


def moved_rows(module: Any, token_ids: Tensor, cached: Rows, logits: Tensor) -> Tensor:
    """float [T]: how far each row of the source's logits [T, vocab] moves under noise, as a part of the largest."""
    generator = torch.Generator().manual_seed(20261)

    def with_noise(_: Any, __: Any, embedded: Tensor) -> Tensor:
        return embedded * (1 + _NOISE * torch.randn(embedded.shape, generator=generator))

    moved = torch.zeros(len(logits))
    hook = module.get_input_embeddings().register_forward_hook(with_noise)
    try:
        for _ in range(_TRIES):
            moved = torch.maximum(moved, (source_logits(module, token_ids, cached) - logits).abs().amax(1))
    finally:
        hook.remove()
    return moved / logits.abs().max()
