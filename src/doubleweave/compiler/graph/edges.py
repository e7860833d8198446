"""The form in which a value crosses a segment's edge, [1, T, …]: rows of one sequence, which a run may chunk.

Inside segments a value may have its rows at another axis: an unsqueezed table is [1, 1, T, D], streams that are stacked
are [4, 1, T, D]. It crosses as [1, T, F], the rows first and all else flattened behind them; the segment that computes
it writes it so, and those that read it take the form back. An axis may also count several neighbours for each row, as
heads do in [4 * T, D]. This module knows nothing of what the values are for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import NEXT, STATE, expression, insert

aten = torch.ops.aten


class Edges:
    """The edges of a graph whose rows have the size `symbol`, an expression."""

    def __init__(self, symbol: Any) -> None:
        self.symbol = symbol

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """The sizes with which the value of `node` crosses; its own where it crosses as it is, or cannot."""
        sizes = tuple(node.meta["val"].shape)
        if (axis := self._moved_axis(node)) is None:
            return sizes
        return (1, sizes[axis] // self._per_row(sizes[axis]), self._width(sizes, axis))

    def outside(self, graph: fx.Graph, copy: Any, original: fx.Node) -> Any:
        """Insert what brings the copy of `original` in a segment's graph to the form that crosses."""
        if (axis := self._moved_axis(original)) is None:
            return copy
        sizes = original.meta["val"].shape
        if not _is_first(sizes, axis):
            copy = insert(graph, aten.permute.default, copy, _rows_first(len(sizes), axis), like=original)
        return insert(graph, aten.reshape.default, copy, [1, -1, self._width(sizes, axis)], like=original)

    def inside(self, graph: fx.Graph, crossing: Any, original: fx.Node) -> Any:
        """Insert what takes the form of `original` back from its placeholder, which gets the value that crosses."""
        if (axis := self._moved_axis(original)) is None:
            return crossing
        sizes = original.meta["val"].shape
        crossing.meta["val"] = original.meta["val"].new_empty(self.shape(original))
        inner = [-1 if at == axis else size for at, size in enumerate(sizes)]
        if _is_first(sizes, axis):
            return insert(graph, aten.view.default, crossing, inner, like=original)
        order = _rows_first(len(sizes), axis)
        rows = insert(graph, aten.view.default, crossing, [inner[at] for at in order], like=original)
        back = [order.index(at) for at in range(len(sizes))]
        return insert(graph, aten.permute.default, rows, back, like=original)

    def _moved_axis(self, node: fx.Node) -> int | None:
        """The axis of the rows where the value has another form inside; None where it has not, or has no such axis."""
        if STATE in node.meta or NEXT in node.meta:  # there once, not once a row
            return None
        sizes = node.meta["val"].shape
        found = [at for at, size in enumerate(sizes) if self._per_row(size)]
        is_plain = len(sizes) > 1 and found == [1] and sizes[0] == 1 and self._per_row(sizes[1]) == 1
        others = [size for at, size in enumerate(sizes) if at not in found]
        if is_plain or len(found) != 1 or not all(isinstance(size, int) for size in others):
            return None
        (axis,) = found
        # Neighbours stay together only where the rows come first.
        return axis if self._per_row(sizes[axis]) == 1 or _is_first(sizes, axis) else None

    def _per_row(self, size: Any) -> int:
        """How many places of an axis of this size each row has; 0 where it is no axis of rows."""
        share: Any = expression(size) / self.symbol
        return int(share) if share.is_Integer else 0

    def _width(self, sizes: Any, axis: int) -> int:
        others = (int(size) for at, size in enumerate(sizes) if at != axis)
        return math.prod(others) * self._per_row(sizes[axis])


def _is_first(sizes: Any, axis: int) -> bool:
    """Whether no axis with more than one element lies in front of the rows: bringing them there moves nothing."""
    return all(size == 1 for size in sizes[:axis])


def _rows_first(rank: int, axis: int) -> list[int]:
    return [axis, *(at for at in range(rank) if at != axis)]
