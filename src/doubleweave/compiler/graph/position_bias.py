"""Understand by evaluation what is added to attention's scores for where a query and a key stand.

Masks and biases come in as many forms as models: buffers cut to size, comparisons of positions, cumulative sums of
ones. What they have in common is that their subgraph reads positions, sizes and constants alone, so that it can be
computed at several sizes, and what comes out compared with what the attention operator knows: a causal mask, perhaps
with a window or in blocks, and a slope a head (ALiBi) or a number for each head and distance (T5). This module knows
nothing of segments or transformers.

Shape legend: T tokens, H heads, or 1 where all heads have the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.evaluate import SIZE_ONLY, Evaluator
from doubleweave.compiler.graph.nodes import constant, is_call
from doubleweave.compiler.graph.positions import POSITIONS

# Numbers of tokens that show a pattern, large enough for the positions to leave a small block or window.
_SIZES = (3, 24, 41)
# Numbers of scores that are computed at once, at most: 512 MB.
_MOST_SCORES = 1 << 27
# A score of less has no weight beside one of ordinary size: models hide keys by -10,000 and by less.
_HIDDEN = -5000.0
# Numbers of tokens that show from which distance on a bias stays the same.
_LONG = (300, 1200)


class NotUnderstood(Exception):
    """What was found, in words."""


class _NoSlope(NotUnderstood):
    """Scores have another bias than slopes."""


@dataclass(frozen=True)
class Bias:
    """What the attention operator can add to scores; `slopes` float32 [H] and `distances` [H, L], None for none."""

    window: int
    block: int
    slopes: Tensor | None
    distances: Tensor | None = None

    def scores(self, num_tokens: int) -> Tensor:
        """float32 [H, T, T], -inf for keys that are not seen."""
        query, key = torch.arange(num_tokens).unsqueeze(1), torch.arange(num_tokens)
        hidden = _hidden(query, key, self.window, self.block)
        slopes = torch.zeros(1) if self.slopes is None else self.slopes
        scores = slopes.view(-1, 1, 1) * (key - query)
        if self.distances is not None:
            scores = scores + self.distances[:, (query - key).clamp(0, self.distances.shape[1] - 1)]
        return scores.masked_fill(hidden, -torch.inf)


def _hidden(query: Tensor, key: Tensor, window: int, block: int) -> Tensor:
    hidden = key > query
    if window:
        hidden = hidden | (key <= query - window)
    return hidden | (key < query // block * block) if block else hidden


class Positions(Evaluator):
    """The nodes of a graph whose values follow from positions, sizes and constants, and their values."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.nodes: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                known = node.target == POSITIONS
            elif node.op == "call_function":
                known = is_call(node, *SIZE_ONLY) or all(n in self.nodes for n in _tensors(node))
            else:
                known = node.op == "get_attr"
            if known:
                self.nodes.add(node)

    def given_by_rows(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node reads and that do not follow from positions."""
        return [source for source in _tensors(node) if source not in self.nodes]

    def sizes(self, nodes: Iterable[fx.Node], num_heads: int) -> list[int]:
        """The numbers of tokens to evaluate `nodes` at, in order: just past each number that they are made with too.

        Raises NotUnderstood for a number that is too large for that, which may be a window.
        """
        marked: set[int] = set()
        most = int((_MOST_SCORES / max(num_heads, 1)) ** 0.5)
        for node in self.needed(nodes, {}):
            if node.op == "get_attr":
                tensor = constant(self.module, node)
                marked |= {int(size) for size in tensor.shape}
                if tensor.numel() == 1 and not tensor.is_floating_point():
                    marked |= {int(tensor) + 3}
            elif node.op == "call_function":
                numbers = _numbers((node.args, node.kwargs))
                marked |= {int(n) + 3 for n in numbers if n == int(n)}
                if large := [n for n in numbers if isinstance(n, int) and n > most]:
                    raise NotUnderstood(
                        f"positions are compared with {large[0]}, and at most {most} can be tried"
                    )
        return sorted({*_SIZES, *(size for size in marked if _SIZES[-1] < size <= most)})


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if _has_tensors(source.meta.get("val"))]


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensors, value)))


def _numbers(arguments: Any) -> list[float]:
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, (list, tuple)):
        return [number for argument in arguments for number in _numbers(argument)]
    is_number = isinstance(arguments, (int, float)) and not isinstance(arguments, bool)
    return [arguments] if is_number and abs(arguments) < 1e9 else []


def bias_of(mask: fx.Node, positions: Positions) -> Bias:
    """The bias that a mask of positions alone, [.., T, T], gives; raises NotUnderstood."""

    def at_size(size: int) -> Tensor:
        return _additive(positions.values([mask], size, {})[mask], size)

    biases = {}
    for size in positions.sizes([mask], 1):
        try:
            biases[size] = at_size(size)
        except Exception:
            if size in positions.sizes([], 1):
                raise NotUnderstood(f"its mask cannot be computed for {size} tokens") from None
    return understood(biases, at_size)


def _additive(mask: Tensor, num_tokens: int) -> Tensor:
    """A mask as float32 [H, T, T] to be added."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return mask.float().reshape(-1, *mask.shape[-2:])[..., :num_tokens, :num_tokens]


def understood(biases: Mapping[int, Tensor], at_size: Callable[[int], Tensor]) -> Bias:
    """The bias that gives the same weights as these, float32 [H, T, T] by T; raises NotUnderstood.

    `at_size` gives it for other numbers of tokens.
    """
    # The largest shows windows and blocks that the others are too small for.
    num_tokens = max(biases)
    found = _read(biases[num_tokens], num_tokens)
    try:
        _check(found, biases)
    except _NoSlope:
        num_heads = len(biases[num_tokens])
        for size in (size for size in _LONG if num_heads * size * size <= _MOST_SCORES):
            long = at_size(size)
            if (distances := _distances(long)) is not None:
                found = replace(found, slopes=None, distances=distances)
                _check(found, {**biases, size: long})
                return found
        raise
    return found


def _distances(bias: Tensor) -> Tensor | None:
    """What keys have by their distance, float32 [H, L], less what a query's own has; None where the second half of all
    distances does not have the same."""
    by_distance = bias[:, -1].flip(-1)
    by_distance = by_distance - by_distance[:, :1]
    moves = (by_distance != by_distance[:, -1:]).any(dim=0).nonzero()
    length = int(moves.max()) + 2 if len(moves) else 1
    return by_distance[:, :length].contiguous() if 2 * length <= by_distance.shape[1] else None


def _check(found: Bias, biases: Mapping[int, Tensor]) -> None:
    for size, given in biases.items():
        wanted = found.scores(size)
        seen = wanted > -torch.inf
        # The softmax leaves out what all keys of a query have in common, such as slope * its own position.
        own = torch.arange(size)
        relative = given - given[:, own, own].unsqueeze(2)
        off = (relative - wanted).masked_fill(~seen, 0.0).abs() / (1 + wanted.abs()).masked_fill(~seen, 1.0)
        if (relative[(~seen).expand_as(relative)] > _HIDDEN / 2).any():
            raise NotUnderstood(f"with {size} tokens a query sees keys that {_in_words(found)} hides")
        if (relative[seen.expand_as(relative)] < _HIDDEN).any():
            raise NotUnderstood(f"with {size} tokens keys are hidden that {_in_words(found)} shows")
        if not float(off.max()) < 1e-4:
            raise _NoSlope(
                "scores have a bias by position that is neither a slope a head nor a number for each distance"
            )


def _read(bias: Tensor, num_tokens: int) -> Bias:
    seen = bias > _HIDDEN
    if not (seen == seen[:1]).all():
        raise NotUnderstood("heads see different keys")
    first = seen[0].int().argmax(dim=1)  # of the keys that each query sees
    query = torch.arange(num_tokens)
    window = block = 0
    if int(first[-1]):
        window = int(query[-1] - first[-1]) + 1
        block = int(first.nonzero()[0])
        if (first == (query - window + 1).clamp(min=0)).all():
            block = 0
        elif (first == query // block * block).all():
            window = 0
        else:
            raise NotUnderstood("queries see keys neither in a window nor in blocks")
    hidden = _hidden(query.unsqueeze(1), query, window, block)
    if not torch.equal(~seen[0], hidden):
        is_causal = not (seen[0] & (query > query.unsqueeze(1))).any()
        more = "keys neither in a window nor in blocks" if is_causal else "later keys: the mask is not causal"
        raise NotUnderstood(f"queries see {more}")
    if window == 1 or block == 1:
        return Bias(window, block, None)
    # Over the longest distance, where rounding counts least.
    at = num_tokens - 1 if int(first[-1]) < num_tokens - 1 else num_tokens - 2
    steps = int(at - first[at])
    slopes = ((bias[:, at, at] - bias[:, at, int(first[at])]) / steps).float()
    return Bias(window, block, slopes if float(slopes.abs().max()) > 1e-8 else None)


def _in_words(bias: Bias) -> str:
    more = f" with a window of {bias.window}" if bias.window else ""
    return f"a causal mask{more or (f' in blocks of {bias.block}' if bias.block else '')}"
