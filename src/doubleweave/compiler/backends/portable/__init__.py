"""The portable backend: no delegate, ExecuTorch's own CPU kernels and ours. It refuses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doubleweave.compiler.backends.backend import Backend

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from doubleweave.compiler.backends.lowered import Lowered


def to_edge(exported: dict[str, ExportedProgram], target: str = "", recipe: str = "") -> Lowered:
    """Every operator is a kernel's. There is one target, any CPU."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    from doubleweave.compiler.backends.lowered import Lowered

    edge = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    return Lowered(edge)


BACKEND = Backend("portable", to_edge)
