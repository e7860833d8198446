"""Attention to an encoder's rows, and biases by position that models hand to their attention, as a graph is traced.

This module knows nothing of segments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doubleweave.compiler.graph.ops import CROSS, MASKED
from doubleweave.errors import SplitError
from doubleweave.sources.encoder_decoder import EXAMPLE_ROWS, Decoder

MOST_ENCODED = 2**16  # rows of an encoder
_HIDDEN = -1e30


def example_rows(model: Any) -> tuple[Tensor, ...]:
    """Rows to export a decoder with, float32 [1, E, width]; none for a model without an encoder."""
    return (model.rows[:, :1].repeat(1, EXAMPLE_ROWS, 1),) if isinstance(model, Decoder) else ()


def attend_across(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: tuple[int, int, float, int, float],
    mask: Tensor | None,
    position_bias: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of q [1, T, …] to k and v [1, E, …], rows of another sequence; `parameters` are those of `attend`."""
    if parameters[3] or sinks is not None:
        raise SplitError(
            "its attention to other rows than the tokens' (an encoder's, or compressed ones) has a window or sinks: "
            "expected that every token sees all of them; this architecture is not supported"
        )
    added = [one for one in (mask, position_bias) if one is not None]
    if not added:
        found: Tensor = CROSS(q, k, v, *parameters)
        return found
    # What it adds is understood from the graph (written_attention.py).
    masked: Tensor = MASKED(q, k, v, sum(added[1:], added[0]), *parameters, None)
    return masked


def with_causal_bias(position_bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias by position [1, H, T, T], beside a float mask, as one mask that hides later keys."""
    at = torch.arange(position_bias.shape[-1])
    hidden = position_bias.masked_fill(at > at.unsqueeze(1), _HIDDEN)
    return hidden if mask is None else hidden + mask
