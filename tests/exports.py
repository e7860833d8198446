"""Language models exported as compiling them does: with what only takes time kept out of the way."""

from __future__ import annotations

from doubleweave.compiler.graph import export_llm as exporting
from doubleweave.compiler.less_overhead import with_less_overhead

export_llm = with_less_overhead(exporting.export_llm)
