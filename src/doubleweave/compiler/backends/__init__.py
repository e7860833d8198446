"""The backends: every package in this folder defines BACKEND, its record. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from doubleweave.compiler.backends.backend import Backend, Option
from doubleweave.errors import PolicyError

_registered: dict[str, Backend] = {}


def backends() -> dict[str, Backend]:
    """All backends by name: those of CPUs (the default first), those of NPUs, those that were registered."""
    return {**_packages(), **_registered}


@cache
def _packages() -> dict[str, Backend]:
    names = sorted((found.name for found in iter_modules(__path__) if found.ispkg), reverse=True)
    records: list[Backend] = [import_module(f"{__name__}.{name}").BACKEND for name in names]
    return {backend.name: backend for backend in sorted(records, key=lambda found: found.library.is_npu)}


def llm_backends() -> dict[str, Backend]:
    """The backends that language models can be compiled for: those with recipes."""
    return {name: backend for name, backend in backends().items() if backend.recipes}


def register(backend: Backend) -> None:
    """Add a backend from outside the package; PolicyError where its name is taken."""
    if backend.name in backends():
        raise PolicyError(f"backend {backend.name!r}: is there already; give it another name")
    _registered[backend.name] = backend


def find_backend(name: str, known: Mapping[str, Backend]) -> Backend:
    """The known backend of this name; PolicyError where there is none."""
    if name not in known:
        raise PolicyError(f"backend: found {name!r}, expected one of {', '.join(known)}")
    return known[name]


def option_owners() -> dict[str, tuple[Option, Backend]]:
    """The own options of all backends, by name; of several that have one of a name, the first's."""
    found: dict[str, tuple[Option, Backend]] = {}
    for owner in llm_backends().values():
        for option in owner.options:
            found.setdefault(option.name, (option, owner))
    return found


def own_options(backend: Backend, attention: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A value for each of the backend's own options: the given value, else the default.

    `given` may hold options of any backend, as the command line does; an empty value or a default counts as not given.
    Raises PolicyError for an option of another backend, or a value that the option does not take.
    """
    own = {option.name: option for option in backend.options}
    values = {name: option.default for name, option in own.items()}
    for name, value in given.items():
        option, owner = (own[name], backend) if name in own else option_owners()[name]
        if not value or (checked := option.checked(value)) == option.default:
            continue
        if owner is not backend:
            raise option.misplaced(checked, owner.name, attention, backend.name)
        values[name] = checked
    return values
