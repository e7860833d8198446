"""Lets XNNPACK's serializer take names for weights that nobody reads (unread_weights.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from doubleweave.compiler.backends.unread_weights import UnreadWeights


@contextmanager
def serialized(unread: UnreadWeights) -> Iterator[None]:
    """Meanwhile an unread weight's bytes, and those of its 4-bit values, are its name."""
    from executorch.backends.xnnpack.operators import node_visitor

    visitor = node_visitor.NodeVisitor
    to_nibbles = visitor.convert_to_qc4w

    def as_nibbles(values: Tensor) -> Tensor:
        packed: Tensor = unread.as_nibbles(values) if values in unread else to_nibbles(values)
        return packed

    visitor.convert_to_qc4w = staticmethod(as_nibbles)
    try:
        with unread.named_in(node_visitor):
            yield
    finally:
        visitor.convert_to_qc4w = staticmethod(to_nibbles)
