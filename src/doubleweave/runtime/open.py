"""Open a program folder: of a language model or of any other module.

It knows nothing of how programs run.
"""

from __future__ import annotations

from pathlib import Path

from doubleweave.errors import ProgramError
from doubleweave.ir import manifest
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.module.program import ModuleProgram


def open(folder: str | Path, *, verify: bool = False, keeps_packed: bool = True) -> Program | ModuleProgram:
    """Open a program folder: a Program for a language model, a ModuleProgram for any other module.

    verify: compute the program's SHA-256 though it was found right before and the file was not written since.
    keeps_packed: keep the weights of a large language model, as XNNPACK packs them, in the cache folder
    ($DOUBLEWEAVE_CACHE), from where later openings map them.
    Raises ProgramError when it is missing or damaged.
    """
    path = Path(folder)
    found = manifest.read(path, verify=verify)
    return (
        ModuleProgram(path, found) if found.model is None else Program(path, found, keeps_packed=keeps_packed)
    )


def open_llm(folder: str | Path, *, keeps_packed: bool = True) -> Program:
    """Open a language model's program; raises ProgramError for any other."""
    found = open(folder, keeps_packed=keeps_packed)
    if not isinstance(found, Program):
        raise ProgramError(
            f"{folder}: is the program of module {found.name}, expected a language model's; call it from Python "
            "with doubleweave.open"
        )
    return found
