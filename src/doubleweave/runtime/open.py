"""Open a program folder: of a language model or of any other module.

It knows nothing of how programs run.
"""

from __future__ import annotations

from pathlib import Path

from doubleweave.errors import ProgramError
from doubleweave.ir import manifest
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.module.program import ModuleProgram


def open(folder: str | Path) -> Program | ModuleProgram:
    """Open a program folder: a Program for a language model, a ModuleProgram for any other module.

    Raises ProgramError when it is missing or damaged.
    """
    path = Path(folder)
    found = manifest.read(path)
    return ModuleProgram(path, found) if found.model is None else Program(path, found)


def open_llm(folder: str | Path) -> Program:
    """Open a language model's program; raises ProgramError for any other."""
    found = open(folder)
    if not isinstance(found, Program):
        raise ProgramError(
            f"{folder}: is the program of module {found.name}, expected a language model's; call it from Python "
            "with doubleweave.open"
        )
    return found
