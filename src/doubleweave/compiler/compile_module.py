"""Compile any module into a program: split by a policy, lower, write; the counterpart of torch.export.export."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doubleweave.compiler.program_folder import Progress, check_target, made_beside
from doubleweave.errors import LowerError, PolicyError
from doubleweave.ir.manifest import PROGRAM_FILE, STATE_FILE, Manifest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from doubleweave.compiler.policy import Policy
    from doubleweave.runtime.module.program import ModuleProgram


def compile(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    policy: Policy | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> ModuleProgram:
    """Compile `module`, called with these example arguments, into one program, and open it.

    args, kwargs, dynamic_shapes: as `torch.export.export` takes them. policy: which nested modules are Static and
    which Dynamic, and on which device (policy.py); what no key names is dynamic where `dynamic_shapes` make it so,
    on the CPU. out: the folder to write; without it the program lives as long as the object returned.

    Calling the program takes the module's arguments and returns what it returns. Raises PolicyError, SplitError or
    LowerError; `out` is then as it was before.
    """
    from torch import nn

    from doubleweave.compiler.split.split_module import split_module
    from doubleweave.runtime.module.program import open_module

    if not isinstance(module, nn.Module):
        raise PolicyError(f"module: found a {type(module).__name__}, expected a torch.nn.Module")
    for name, value in (("kwargs", kwargs), ("policy", policy)):
        if value is not None and not isinstance(value, Mapping):
            raise PolicyError(f"{name}: found a {type(value).__name__}, expected a dict")
    if not isinstance(args, (tuple, list)):
        raise PolicyError(f"args: found a {type(args).__name__}, expected a tuple of arguments")
    if out is not None and not isinstance(out, (str, Path)):
        raise PolicyError(f"out: found {out!r}, expected the path of a folder to write")
    report = progress or (lambda what, done, total: None)
    if out is None:
        # Outside the working folder, and gone with the program.
        folder = Path(tempfile.mkdtemp(prefix="doubleweave.")) / "program"
    else:
        folder = Path(out)
        check_target(folder, "out=")
    report("tracing", 0, 1)
    try:
        found = split_module(module, tuple(args), dict(kwargs or {}), dynamic_shapes, policy or {})
        with made_beside(folder, "out=") as temporary:
            _write(type(module).__name__, found, temporary, report)
        program = open_module(folder)
    except BaseException:
        if out is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(program, shutil.rmtree, folder.parent, ignore_errors=True)
    return program


def _write(name: str, found: Any, folder: Path, report: Progress) -> None:
    from doubleweave.compiler.lower.lower import jobs, lower

    total = len(jobs(found.torch_split.split)) + 1
    done = 0
    report("lowering", done, total)

    def step(what: str) -> None:
        nonlocal done
        done += 1
        report(f"lowered {what}" if done < total else what, min(done, total), total)

    split, digest = lower(found.torch_split, folder / PROGRAM_FILE, step)
    _check_loads(folder / PROGRAM_FILE)
    Manifest(
        name=name,
        model=None,
        split=split,
        program_sha256=digest,
        program_bytes=(folder / PROGRAM_FILE).stat().st_size,
        state_sha256=_write_states(found.states, folder / STATE_FILE),
        made_with={package: version(package) for package in ("doubleweave", "executorch", "torch")},
    ).write(folder)


def _check_loads(path: Path) -> None:
    """Load every method once: an operator without a kernel is found here, not at the first call."""
    from doubleweave import _native
    from doubleweave.compiler.lower.lower import no_kernel

    program = _native.Program(str(path))
    for method in program.method_names:
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
