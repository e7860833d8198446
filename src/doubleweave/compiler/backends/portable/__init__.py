"""The portable backend: no delegate, ExecuTorch's own CPU kernels and ours. It refuses nothing."""

from __future__ import annotations

from contextlib import nullcontext

from doubleweave.compiler.backends.backend import Backend, late

BACKEND = Backend(
    "portable", to_edge=late(f"{__name__}.lower", "to_edge"), serialized=lambda unread: nullcontext()
)
