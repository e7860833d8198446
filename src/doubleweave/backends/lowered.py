"""What a backend gives back for the methods of one segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from doubleweave.ir import Traffic


@dataclass(frozen=True)
class Lowered:
    """`edge` is ExecuTorch's EdgeProgramManager; `traffic` what the backend's compiler says of a method's memory."""

    edge: Any
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
