"""The context in which a model's rotary embedding stays the same; knows nothing of graphs.

LongRoPE and dynamic scaling choose their frequencies by the length so far, and a longer prompt turns the keys of
earlier tokens by other angles. Cached keys keep theirs, so a program is right only where the frequencies never change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
