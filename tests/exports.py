"""Language models exported as compiling them does: with what only takes time kept out of the way."""

from __future__ import annotations

from typing import Any

import toys
from doubleweave.compiler.graph import export_llm as exporting
from doubleweave.compiler.less_overhead import with_less_overhead
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.ir.split import rows

export_llm = with_less_overhead(exporting.export_llm)


def split_of(module: Any, size: int = 16) -> TorchSplit:
    """A language model's split in float32, for chunks of at most `size` tokens."""
    graph = export_llm(module, size)
    return split_llm(
        graph, exporting.owned_modules(module), default_policy(rows(1, size)), max_context=toys.MAX_CONTEXT
    )
