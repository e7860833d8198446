"""Rotary embeddings whose frequencies change with the length of the text: two sets that a program has, or a refusal.

LongRoPE has two sets of frequencies. A text longer than a border has the long ones for all its tokens, also for those
before the border. A program computes both and takes the set that a position asks for: p by the short frequencies is
given as p, by the long ones as ~p, which is -1 - p. A session that passes the border computes its earlier tokens anew
(runtime/llm/frequencies.py).

Dynamic scaling has other frequencies for every length behind its border. A program is right up to there alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from doubleweave.compiler.graph.nodes import expression, insert, is_call, replace_nodes
from doubleweave.compiler.graph.positions import from_positions, placeholder_of
from doubleweave.errors import SplitError

aten = torch.ops.aten

# transformers' types (modeling_rope_utils.dynamic_rope_update) whose frequencies change behind a length.
_LONG = "longrope"
_BY_LENGTH = (_LONG, "dynamic")
_ORIGINAL = "original_max_position_embeddings"


def rotary_border(config: Any, max_context: int) -> int:
    """The number of tokens that a longer text takes the long frequencies behind, 0 where no text of `max_context` does.

    Raises SplitError where the frequencies change otherwise within `max_context` tokens."""
    config = config.get_text_config(decoder=True)
    borders = set()
    for kind, length in _lengths(config, getattr(config, "rope_parameters", None) or {}):
        if length >= max_context:
            continue
        if kind != _LONG:
            raise SplitError(
                f"{config.model_type}: its rotary embedding ({kind}) takes other frequencies for prompts longer than "
                f"{length} tokens, also for the tokens before, whose keys are in the cache: found a context of "
                f"{max_context}, expected at most {length}; compile it with --max-context {length}"
            )
        borders.add(length)
    if len(borders) > 1:
        raise SplitError(
            f"{config.model_type}: its layers take the long frequencies of {_LONG} behind {sorted(borders)} tokens: "
            f"expected one length; compile it with --max-context {min(borders)}"
        )
    return borders.pop() if borders else 0


@contextmanager
def two_frequencies(module: nn.Module, long: bool) -> Iterator[None]:
    """Meanwhile no rotary embedding asks for the length: it keeps the frequencies of short texts, and where `long`
    takes the long ones for the positions below 0."""
    held: dict[tuple[nn.Module, str], Any] = {
        (parent, name): child
        for parent in module.modules()
        for name, child in parent.named_children()
        if hasattr(child, "rope_type")
    }
    try:
        for (parent, name), rotary in held.items():
            kinds = {rotary.rope_type} if isinstance(rotary.rope_type, str) else {*rotary.rope_type.values()}
            fixed = _fixed(rotary, False)
            setattr(parent, name, _Two(fixed, _fixed(rotary, True)) if long and _LONG in kinds else fixed)
        yield
    finally:
        for (parent, name), rotary in held.items():
            setattr(parent, name, rotary)


class _Two(nn.Module):
    """A rotary embedding that takes `long`'s frequencies for positions below 0."""

    def __init__(self, short: nn.Module, long: nn.Module) -> None:
        super().__init__()
        self.short, self.long = short, long

    def forward(self, x: Tensor, position_ids: Tensor, **more: Any) -> Any:
        # split_positions gives the comparison the positions as they come, and the rest the positions that are meant.
        is_long = position_ids < 0
        pairs = (rotary(x, position_ids, **more) for rotary in (self.long, self.short))
        return _pytree.tree_map(lambda one, other: torch.where(is_long[..., None], one, other), *pairs)


def _fixed(rotary: Any, long: bool) -> Any:
    """A copy of the rotary embedding that asks for no length, over the same tensors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fixed = copy.copy(rotary)
    fixed._buffers = dict(rotary._buffers)
    kinds: str | Mapping[str, str] = rotary.rope_type
    by_layer = {None: kinds} if isinstance(kinds, str) else dict(kinds)
    names = {}
    for layer, kind in by_layer.items():
        prefix = "" if layer is None else f"{layer}_"
        names[layer] = "default" if kind in _BY_LENGTH else kind
        if kind not in _BY_LENGTH:
            continue
        # A run of the module may have left the frequencies of another length.
        frequencies = getattr(rotary, f"{prefix}original_inv_freq").clone()
        if kind == _LONG and long:
            given = {} if layer is None else {"layer_type": layer}
            border = dict(_lengths(rotary.config, _parameters(rotary.config, layer)))[kind]
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](rotary.config, None, seq_len=border + 1, **given)
        setattr(fixed, f"{prefix}inv_freq", frequencies)
    fixed.rope_type = names[None] if isinstance(kinds, str) else names
    return fixed


def _parameters(config: Any, layer: str | None) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.rope_parameters
    return found if layer is None else found[layer]


def split_positions(graph_module: fx.GraphModule) -> None:
    """Where the graph asks for positions below 0, make the positions that are meant, for all else that reads them."""
    graph = graph_module.graph
    given = placeholder_of(graph)
    of_positions = {given, *from_positions(graph)}
    shape = [expression(size) for size in given.meta["val"].shape]

    def asks(node: Any) -> bool:
        sizes = node.meta["val"].shape if is_call(node, aten.lt.Scalar) else ()
        return (
            is_call(node, aten.lt.Scalar)
            and node.args[0] in of_positions
            and node.args[1] == 0
            and [expression(size) for size in sizes] == shape
        )

    asking = [node for node in graph.nodes if asks(node)]
    if not asking:
        raise SplitError(
            f"its rotary embedding ({_LONG}) does not read the positions [1, T] that it is given; compile it for a "
            "context within the length at which its frequencies change"
        )
    readers = list(given.users)
    with graph.inserting_after(given):
        is_long = insert(graph, aten.lt.Scalar, given, 0, like=asking[0])
    with graph.inserting_after(is_long):
        other = insert(graph, aten.bitwise_not.default, given, like=asking[0])
    with graph.inserting_after(other):
        meant = insert(graph, aten.where.self, is_long, other, given, like=asking[0])
    for reader in readers:
        reader.replace_input_with(given, meant)
    replace_nodes(graph, lambda node: is_long if node in asking else None)
    graph_module.recompile()


def _lengths(config: Any, parameters: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(type, tokens up to which it stays the same) of each rotary embedding whose frequencies change."""
    kind = parameters.get("rope_type", "")
    if kind == _LONG:
        # The place of the original length differs between configs of one type.
        places = (parameters.get(_ORIGINAL), getattr(config, _ORIGINAL, None), config.max_position_embeddings)
        yield kind, int(next(filter(None, places)))
    elif kind in _BY_LENGTH:
        yield kind, int(config.max_position_embeddings)
    for inner in parameters.values():  # one for each kind of layer
        if isinstance(inner, Mapping):
            yield from _lengths(config, inner)
