"""The result of lowering the methods of one segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.export import ExportedProgram

from doubleweave.ir.split import Traffic


@dataclass(frozen=True)
class Lowered:
    """`edge` is ExecuTorch's EdgeProgramManager; `traffic` memory traffic by method, where a compiler reports it."""

    edge: Any
    traffic: Mapping[str, Traffic] = field(default_factory=dict)


def operators(program: ExportedProgram) -> list[Any]:
    """The nodes that call something. A getitem only picks one of an operator's results, so it is not counted."""
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and "getitem" not in str(node.target)
    ]


def left_over(program: ExportedProgram) -> list[str]:
    """The names of a lowered program's operators that no delegate took."""
    return sorted(
        {str(node.target) for node in operators(program) if "call_delegate" not in str(node.target)}
    )
