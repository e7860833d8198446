"""Doubleweave: one `nn.Module` in, one ExecuTorch program with static and dynamic parts out.

Opening and running a program needs no torch; compiling imports it when first used. The names below are
imported when they are first asked for, so that the plain-data modules load without the native one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doubleweave.compiler.policy import Dynamic, Static
    from doubleweave.entries.compile_and_open import compile
    from doubleweave.entries.compile_llm import compile_llm
    from doubleweave.entries.encoders import Encoder
    from doubleweave.errors import (
        BackendError,
        CheckError,
        DoubleweaveError,
        InputError,
        LowerError,
        PolicyError,
        ProgramError,
        RunError,
        ScheduleError,
        SourceError,
        SplitError,
    )
    from doubleweave.runtime.llm.generate import Generation
    from doubleweave.runtime.llm.program import Program
    from doubleweave.runtime.llm.sampling import Sampling
    from doubleweave.runtime.llm.session import Session
    from doubleweave.runtime.module.method import Method
    from doubleweave.runtime.module.program import ModuleProgram, ModuleSession
    from doubleweave.runtime.module.states import States
    from doubleweave.runtime.module.submit import Result
    from doubleweave.runtime.open import open
    from doubleweave.timeline.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckError",
    "DoubleweaveError",
    "Dynamic",
    "Encoder",
    "Generation",
    "InputError",
    "LowerError",
    "Method",
    "ModuleProgram",
    "ModuleSession",
    "PolicyError",
    "Program",
    "ProgramError",
    "Result",
    "RunError",
    "Sampling",
    "ScheduleError",
    "Session",
    "SourceError",
    "SplitError",
    "States",
    "Static",
    "Timeline",
    "compile",
    "compile_llm",
    "open",
]

_HOME = {
    "Dynamic": "compiler.policy",
    "Encoder": "entries.encoders",
    "Generation": "runtime.llm.generate",
    "Method": "runtime.module.method",
    "ModuleProgram": "runtime.module.program",
    "ModuleSession": "runtime.module.program",
    "Program": "runtime.llm.program",
    "Result": "runtime.module.submit",
    "Sampling": "runtime.llm.sampling",
    "Session": "runtime.llm.session",
    "States": "runtime.module.states",
    "Static": "compiler.policy",
    "Timeline": "timeline.timeline",
    "compile": "entries.compile_and_open",
    "compile_llm": "entries.compile_llm",
    "open": "runtime.open",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"doubleweave.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
