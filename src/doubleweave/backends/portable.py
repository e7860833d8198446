"""The portable backend: no delegate, ExecuTorch's own CPU kernels and ours. It refuses nothing."""

from __future__ import annotations

NAME = "portable"


def partitioners() -> list[object]:
    """None: every operator runs as a kernel."""
    return []
