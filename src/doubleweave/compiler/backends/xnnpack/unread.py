"""Lets XNNPACK's serializer take names for weights that nobody reads (unread_weights.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from doubleweave.compiler.backends.unread_weights import UnreadWeights


@contextmanager
def serialized(unread: UnreadWeights) -> Iterator[None]:
    """Meanwhile an unread weight's bytes are its name."""
    from executorch.backends.xnnpack.operators import node_visitor

    with unread.named_in(node_visitor):
        yield
