"""The portable backend: no delegate, ExecuTorch's own CPU kernels and ours. It refuses nothing."""

from __future__ import annotations

import torch

from doubleweave.compiler.backends.lowered import Lowered

NAME = "portable"


def to_edge(exported: dict[str, torch.export.ExportedProgram], target: str = "", recipe: str = "") -> Lowered:
    """Every operator is a kernel's. There is one target, any CPU."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    return Lowered(edge)
