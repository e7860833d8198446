"""Gives memory that was freed back to the system, which glibc does not do by itself.

Loading a model frees as much as the model takes, in pieces between those that live on; what comes later would otherwise
be added to it. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import gc


def give_back_free_memory() -> None:
    """Where the C library cannot, nothing happens."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
