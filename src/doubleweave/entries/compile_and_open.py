"""`doubleweave.compile`: the compiler writes a program folder, the run time opens it. Neither imports the other."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doubleweave.entries.compile_module import compile_module
from doubleweave.runtime.module.program import ModuleProgram
from doubleweave.runtime.open import open

if TYPE_CHECKING:
    from torch import nn

    from doubleweave.compiler.policy import Policy
    from doubleweave.compiler.program_folder import Progress


def compile(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    policy: Policy | None = None,
    out: str | Path | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> ModuleProgram:
    """Compile `module`, called with these example arguments, into one program, and open it.

    args, kwargs, dynamic_shapes: as `torch.export.export` takes them. policy: which nested modules are Static and
    which Dynamic, and on which device (compiler/policy.py); what no key names is dynamic where `dynamic_shapes` make
    it so, on the CPU. out: the folder to write; without it the program lives as long as the object returned. check: run
    the program against the module, on the example and at the ends of its dims.

    Calling the program takes the module's arguments and returns what it returns. Raises PolicyError, SplitError,
    LowerError or CheckError; `out` is then as it was before.
    """
    with ExitStack() as cleanup:
        if out is None:
            temporary = tempfile.mkdtemp(prefix="doubleweave.")  # not in the working folder
            cleanup.callback(shutil.rmtree, temporary, ignore_errors=True)
            out = Path(temporary) / "program"
        compile_module(module, args, kwargs, dynamic_shapes, policy, out, check, progress)
        program = open(out)
        assert isinstance(program, ModuleProgram)
        # Sessions that the program opens later read the states' first values from the folder.
        weakref.finalize(program, cleanup.pop_all().close)
        return program
