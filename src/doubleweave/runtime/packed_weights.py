"""Weights as XNNPACK packs them, in files of the cache folder: which program's, and what the folder has.

The files, and when they may be used, are the affair of native/src/packed_weights.cpp, which doubleweave-run calls as
well.
"""

from __future__ import annotations

from doubleweave import _native
from doubleweave.ir.cache_folder import cache_folder
from doubleweave.ir.split import Split

MOST_BYTES: int = _native.MOST_KEPT_BYTES  # of all programs together


def packed_weights(split: Split, digest: str, name: str) -> _native.PackedWeights:
    """The packed weights of the program with this SHA-256; none are kept where it is small, or the disk is full."""
    return _native.PackedWeights(_cache(), digest, name, min(split.weight_bytes, MOST_BYTES + 1))


def kept() -> list[_native.KeptWeights]:
    """What the cache has, the longest unused first."""
    return _native.kept_weights(_cache())


def make_room(most: int = MOST_BYTES) -> int:
    """Remove what was not used for longest, until at most so many bytes are left; returns the bytes removed. A program
    that is running keeps what it has mapped."""
    return _native.remove_kept_weights(_cache(), most)


def _cache() -> str:
    return str(cache_folder() or "")
