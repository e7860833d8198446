"""Find the profile that a program runs by: a named profile, its own measured on this machine, or a generic one."""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from doubleweave.errors import InputError
from doubleweave.ir.manifest import Manifest
from doubleweave.ir.split import Split
from doubleweave.predict.estimate import weight_format
from doubleweave.predict.profile import Profile
from doubleweave.predict.profile_file import read_profile

# In a program's folder: measured by `doubleweave profile`.
PROFILE_FILE = "profile.toml"
GENERIC = "generic"


def find_profile(folder: Path, manifest: Manifest, given: str | None = None) -> Profile:
    """The profile of that name or path; else the folder's own if it was measured on this machine; else a generic one.

    Raises InputError for a profile that is missing, malformed or of another program.
    """
    if given is not None:
        found = read_profile(Path(given)) if given.endswith(".toml") else shipped(given)
    else:
        own = folder / PROFILE_FILE
        found = read_profile(own) if own.exists() else shipped(GENERIC)
        # A program that is copied to another machine takes its profile along, whose times are wrong there.
        if found.machine and found.machine != this_machine():
            found = shipped(GENERIC)
    if found.program and found.program != program_id(manifest.split):
        raise InputError(
            f"profile {given or found.name}: was measured for program {found.program}, expected "
            f"{program_id(manifest.split)} (this one); measure it with doubleweave profile {folder}"
        )
    quantize = "none" if manifest.model is None else manifest.model.quantize
    return replace(found, weights=weight_format(quantize))


def shipped_names() -> list[str]:
    """The profiles that come with the package."""
    found = files("doubleweave") / "profiles"
    return sorted(item.name.removesuffix(".toml") for item in found.iterdir() if item.name.endswith(".toml"))


def shipped(name: str) -> Profile:
    """A profile that comes with the package; raises InputError for a name that does not exist."""
    if name not in shipped_names():
        raise InputError(
            f"profile: found {name!r}, expected a .toml file or one of {', '.join(shipped_names())}"
        )
    return read_profile(Path(str(files("doubleweave") / "profiles" / f"{name}.toml")))


def program_id(split: Split) -> str:
    """A digest of the segments' structures, devices, backends and sizes. Weights' numbers are not in it: times do not
    depend on them, so a profile holds for every program of the same shape."""
    text = repr([(s.name, s.structure, s.device, s.backend, s.shape) for s in split.segments])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def this_machine() -> str:
    """Processor and number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {num_cores()} cores"


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))  # os.cpu_count() counts cores that the process may not use
