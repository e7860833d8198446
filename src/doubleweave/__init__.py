"""Doubleweave: one `nn.Module` in, one ExecuTorch program with static and dynamic parts out.

Opening and running a program needs no torch; compiling imports it when first used.
"""

from doubleweave.compile import compile_llm
from doubleweave.errors import (
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
from doubleweave.generate import Generation
from doubleweave.method import Method
from doubleweave.program import Program, open
from doubleweave.sampling import Sampling
from doubleweave.session import Session
from doubleweave.timeline import Timeline

__version__ = "0.1.0"

__all__ = [
    "DoubleweaveError",
    "Generation",
    "InputError",
    "LowerError",
    "Method",
    "PolicyError",
    "Program",
    "ProgramError",
    "RunError",
    "Sampling",
    "ScheduleError",
    "Session",
    "SourceError",
    "SplitError",
    "Timeline",
    "compile_llm",
    "open",
]
