"""Keeps what there is out of Python's garbage collector while something is compiled.

torch, transformers and ExecuTorch are some two million objects that the collector would go through again and again,
because tracing makes so many new ones: an eighth of the time that a small model takes. Knows nothing of models.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What is made inside is collected as ever. Where something is frozen already, it stays so, and nothing happens."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
