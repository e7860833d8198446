"""torch.export over dims from 1 on: torch takes a size of 0 or 1 for a constant. It knows nothing of models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from doubleweave.compiler.graph.proved_rules import with_proved_rules


def export(module: nn.Module, args: Sequence[Any], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    """torch.export.export, not strict: only operators are traced. Raises what it raises.

    Where nothing is in its way but that a size in between could be 0 or 1 at an end of the dims (a length - 1), it is
    told to take those for sizes like others.
    """

    def run() -> torch.export.ExportedProgram:
        return torch.export.export(module, tuple(args), dynamic_shapes=dynamic_shapes, strict=False)

    try:
        return with_proved_rules(module, run)
    except Exception as error:
        if not _asks_for_more_than_one(str(error)):
            raise
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return run()


def _asks_for_more_than_one(message: str) -> bool:
    refused = [line for line in message.splitlines() if line.startswith("  - ")]
    return bool(refused) and all(re.search(r" generated guard .* != [01]\.$", line) for line in refused)
