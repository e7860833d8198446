"""Every error that a user of Doubleweave can meet, as one tree.

```
DoubleweaveError(Exception)         catches all of them; the command line prints it and exits with 2
├── SourceError(…, ValueError)      a model source that cannot be read or is of no supported kind
├── PolicyError(…, ValueError)      a policy, or an option that becomes one, that asks for something impossible
├── SplitError(…, ValueError)       a model that cannot be split by its policy
├── LowerError(…, RuntimeError)     a segment that its backend cannot lower
├── CheckError(…, RuntimeError)      a compiled program that gives other numbers than its source
├── BackendError(…, RuntimeError)   a vendor's library that is missing here or of a version that does not fit
├── ProgramError(…, ValueError)     a program folder that is missing, damaged or of another version
├── InputError(…, ValueError)       a prompt, token ids, an option or an argument of a call out of range
├── ScheduleError(…, ValueError)    a schedule that misses or doubles a task, or would wait for ever
└── RunError(…, RuntimeError)       a method that failed while it ran
```

The second base says whose mistake it is, to callers that know nothing of Doubleweave: ValueError for something that the
caller gave, RuntimeError for something that went wrong here. A message says in a sentence or a few what was found, what
was expected and what to do. This module knows nothing of torch or ExecuTorch.
"""

from __future__ import annotations


def first_line(error: BaseException, otherwise: str | None = None, most: int = 300) -> str:
    """The first line of another library's error, at most so many characters; where it says nothing `otherwise`, by
    default the error's type."""
    said = str(error).strip().splitlines() or [type(error).__name__ if otherwise is None else otherwise]
    return said[0][:most]


class DoubleweaveError(Exception):
    """Base of all errors below; the command line prints it in one line and exits with 2."""


class SourceError(DoubleweaveError, ValueError):
    """The model source cannot be read, or is of a kind that is not supported."""


class PolicyError(DoubleweaveError, ValueError):
    """A policy (or an option that becomes one) asks for something impossible."""


class SplitError(DoubleweaveError, ValueError):
    """The model cannot be split as asked."""


class LowerError(DoubleweaveError, RuntimeError):
    """A segment cannot be lowered by its backend."""


class CheckError(DoubleweaveError, RuntimeError):
    """A compiled program gives other numbers than its source, so it was not written."""


class BackendError(DoubleweaveError, RuntimeError):
    """What a backend needs on this machine is missing, or of a version that does not fit."""


class ProgramError(DoubleweaveError, ValueError):
    """A program on disk is missing, damaged or of another version."""


class InputError(DoubleweaveError, ValueError):
    """A prompt, token ids or an argument of a call is out of range."""


class ScheduleError(DoubleweaveError, ValueError):
    """A schedule cannot run: a task is missing, doubled, out of order or would wait for ever."""


class RunError(DoubleweaveError, RuntimeError):
    """A method failed while it ran."""
