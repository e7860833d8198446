"""Compile any module into a program folder: split it by a policy, lower the segments, load each method once, write."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doubleweave.compiler.less_overhead import with_less_overhead
from doubleweave.compiler.memory_limit import naming_memory
from doubleweave.compiler.program_folder import Progress, check_target, made_beside
from doubleweave.errors import LowerError, PolicyError
from doubleweave.ir.manifest import PROGRAM_FILE, STATE_FILE, Manifest
from doubleweave.runtime.module.program import ModuleProgram
from doubleweave.runtime.open import open

if TYPE_CHECKING:
    from torch import Tensor, nn

    from doubleweave.compiler.policy import Policy


# The check's time, as a part of the time before it.
CHECK_PART = 0.15


def compile_module(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    policy: Policy | None,
    out: str | Path,
    check: bool,
    progress: Progress | None,
) -> None:
    """Compile `module`, called with these example arguments, into the folder `out`.

    The arguments are those of `doubleweave.compile`. Raises PolicyError, SplitError, LowerError or CheckError; `out`
    is then as it was before.
    """
    check_arguments(module, args, kwargs, policy)
    if not isinstance(out, (str, Path)):
        raise PolicyError(f"out: found {out!r}, expected the path of a folder to write")
    report = progress or (lambda what, done, total: None)
    folder = Path(out)
    check_target(folder, "out=")
    with naming_memory(report) as told:
        _compile(module, (tuple(args), dict(kwargs or {})), dynamic_shapes, policy or {}, folder, check, told)


@with_less_overhead
def _compile(
    module: nn.Module,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    dynamic_shapes: Any,
    policy: Policy,
    folder: Path,
    check: bool,
    report: Progress,
) -> None:
    from doubleweave.compiler.split.split_module import split_module

    began = time.perf_counter()
    report("tracing", 0, 1)
    found = split_module(module, *given, dynamic_shapes, policy)
    with made_beside(folder, "out=") as temporary:
        made = _write(type(module).__name__, found, temporary, report)
        if check:
            from doubleweave.check.module import check_module

            program = open(temporary)
            assert isinstance(program, ModuleProgram)
            budget_s = CHECK_PART * (time.perf_counter() - began)
            checked = check_module(module, given, lambda: program.session().main, report, budget_s)
            replace(made, check=checked).write(temporary)


def check_arguments(module: Any, args: Any, kwargs: Any, policy: Any) -> None:
    """Raises PolicyError for arguments of another kind than `doubleweave.compile` takes."""
    from torch import nn

    if not isinstance(module, nn.Module):
        raise PolicyError(f"module: found a {type(module).__name__}, expected a torch.nn.Module")
    for name, value in (("kwargs", kwargs), ("policy", policy)):
        if value is not None and not isinstance(value, Mapping):
            raise PolicyError(f"{name}: found a {type(value).__name__}, expected a dict")
    if not isinstance(args, (tuple, list)):
        raise PolicyError(f"args: found a {type(args).__name__}, expected a tuple of arguments")


def _write(name: str, found: Any, folder: Path, report: Progress) -> Manifest:
    from doubleweave.compiler.lower.lower import lower

    split, digest, _ = lower(found.torch_split, folder / PROGRAM_FILE, report)
    check_loads(folder / PROGRAM_FILE)
    manifest = Manifest(
        name=name,
        model=None,
        split=split,
        program_sha256=digest,
        program_bytes=(folder / PROGRAM_FILE).stat().st_size,
        state_sha256=_write_states(found.states, folder / STATE_FILE),
        made_with={package: version(package) for package in ("doubleweave", "executorch", "torch")},
        check=None,
    )
    manifest.write(folder)
    return manifest


def check_loads(path: Path, methods: Sequence[str] | None = None) -> None:
    """Load these methods, or all, once: an operator without a kernel is found here, not at the first call."""
    from doubleweave import _native
    from doubleweave.compiler.lower.lower import no_kernel

    program = _native.Program(str(path))
    for method in program.method_names if methods is None else methods:
        try:
            program.load(method)
        except _native.Error as error:
            missing = re.search(r"kernel 'aten::([\w.]+)' not found", str(error))
            if missing:
                raise no_kernel(method, missing[1]) from None
            what = str(error).replace(str(path), path.name)
            raise LowerError(f"segment {method}: cannot be loaded: {what}") from None


def _write_states(states: Mapping[str, Tensor], path: Path) -> str:
    """First values of the states, one behind the other; the file's SHA-256, "" where there are none."""
    from doubleweave.compiler.lower.templates import raw_bytes

    if not states:
        return ""
    data = b"".join(raw_bytes(tensor) for tensor in states.values())
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
