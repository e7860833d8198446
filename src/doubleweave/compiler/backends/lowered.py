"""What a backend gives back for the methods of one segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from doubleweave.ir.split import Traffic


@dataclass(frozen=True)
class Lowered:
    """`edge` is ExecuTorch's EdgeProgramManager; `traffic` what the backend's compiler says of a method's memory."""

    edge: Any
    traffic: Mapping[str, Traffic] = field(default_factory=dict)


def left_over(program: ExportedProgram) -> list[str]:
    """The operators of a lowered program that no delegate took."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return sorted({target for target in targets if "getitem" not in target and "call_delegate" not in target})
