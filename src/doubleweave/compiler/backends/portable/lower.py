"""Lower segments to ExecuTorch's kernels and ours."""

from __future__ import annotations

from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch.export import ExportedProgram

from doubleweave.compiler.backends.lowered import Lowered


def to_edge(exported: dict[str, ExportedProgram], target: str, recipe: str) -> Lowered:
    """Every operator is a kernel's. There is one target, any CPU."""
    edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    return Lowered(edge)
