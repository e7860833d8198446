"""Doubleweave: one `nn.Module` in, one ExecuTorch program with static and dynamic parts out.

Opening and running a program needs no torch; compiling imports it when first used. The names below are
imported when they are first asked for, so that the plain-data modules load without the native one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doubleweave.compile_language_model import compile_llm
    from doubleweave.compile_module import compile
    from doubleweave.errors import (
        BackendError,
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
    from doubleweave.futures import Result
    from doubleweave.generate import Generation
    from doubleweave.method import Method
    from doubleweave.module_program import ModuleProgram, ModuleSession
    from doubleweave.policy import Dynamic, Static
    from doubleweave.program import Program, open
    from doubleweave.sampling import Sampling
    from doubleweave.session import Session
    from doubleweave.states import States
    from doubleweave.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DoubleweaveError",
    "Dynamic",
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
    "Dynamic": "policy",
    "Generation": "generate",
    "Method": "method",
    "ModuleProgram": "module_program",
    "ModuleSession": "module_program",
    "Program": "program",
    "Result": "futures",
    "Sampling": "sampling",
    "Session": "session",
    "States": "states",
    "Static": "policy",
    "Timeline": "timeline",
    "compile": "compile_module",
    "compile_llm": "compile_language_model",
    "open": "program",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"doubleweave.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
