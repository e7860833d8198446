"""Rotary embeddings whose frequencies change with the length: the context in which they do not, and the graph of it.

LongRoPE and dynamic scaling choose their frequencies by the length so far, and a longer prompt turns the keys of
earlier tokens by other angles. Cached keys keep theirs, so a program is right only where the frequencies never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from doubleweave.errors import SplitError

# transformers' types (modeling_rope_utils.dynamic_rope_update) whose frequencies change behind a length.
_BY_LENGTH = ("longrope", "dynamic")
_ORIGINAL = "original_max_position_embeddings"


def check_rotary(config: Any, max_context: int) -> None:
    """Raises SplitError where the frequencies change within `max_context` tokens."""
    config = config.get_text_config(decoder=True)
    for kind, length in _lengths(config, getattr(config, "rope_parameters", None) or {}):
        if length < max_context:
            raise SplitError(
                f"{config.model_type}: its rotary embedding ({kind}) takes other frequencies for prompts longer than "
                f"{length} tokens, also for the tokens before, whose keys are in the cache: found a context of "
                f"{max_context}, expected at most {length}; compile it with --max-context {length}"
            )


@contextmanager
def first_frequencies(module: nn.Module) -> Iterator[None]:
    """Meanwhile rotary embeddings keep the frequencies of short prompts, so that no graph asks for the length."""
    changed: list[tuple[Any, Any]] = [
        (found, found.rope_type) for found in module.modules() if hasattr(found, "rope_type")
    ]
    try:
        for found, kind in changed:
            _fix(found, kind)
        yield
    finally:
        for found, kind in changed:
            found.rope_type = kind


def _fix(module: Any, kinds: str | Mapping[str, str]) -> None:
    by_prefix = (
        {"": kinds} if isinstance(kinds, str) else {f"{layer}_": kind for layer, kind in kinds.items()}
    )
    for prefix, kind in by_prefix.items():
        if kind in _BY_LENGTH:
            with torch.no_grad():  # a run of the module may have left those of a longer prompt
                getattr(module, f"{prefix}inv_freq").copy_(getattr(module, f"{prefix}original_inv_freq"))
    fixed = {prefix: "default" if kind in _BY_LENGTH else kind for prefix, kind in by_prefix.items()}
    module.rope_type = fixed[""] if isinstance(kinds, str) else dict(zip(kinds, fixed.values(), strict=True))


def _lengths(config: Any, parameters: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(type, tokens up to which it stays the same) of each rotary embedding whose frequencies change."""
    kind = parameters.get("rope_type", "")
    if kind == "longrope":
        # The place of the original length differs between configs of one type.
        places = (parameters.get(_ORIGINAL), getattr(config, _ORIGINAL, None), config.max_position_embeddings)
        yield kind, int(next(filter(None, places)))
    elif kind in _BY_LENGTH:
        yield kind, int(config.max_position_embeddings)
    for inner in parameters.values():  # one for each kind of layer
        if isinstance(inner, Mapping):
            yield from _lengths(config, inner)
