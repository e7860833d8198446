"""Which backends work on this machine, and what to install for the others. Needs no torch."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from doubleweave.compiler.backends import backends
from doubleweave.vendors.library import library_of

_COMPILE = ("torch", "transformers", "torchao")


def examine() -> dict[str, Any]:
    """Versions; whether compiling works; each backend, with "works" and, where it does not, "missing"."""
    # Loaded here, not above: importing the command line needs no native module.
    from doubleweave import _native

    return {
        "doubleweave": _version("doubleweave"),
        "python": platform.python_version(),
        "executorch": _version("executorch"),
        "processor": f"{platform.machine()}, {_native.max_threads()} threads",
        "compile": _compiling(),
        "backends": {name: library_of(name).examine() for name in backends()},
    }


def lines_of(found: dict[str, Any]) -> list[str]:
    """`examine`'s result as text."""
    lines = [
        f"doubleweave {found['doubleweave']}, executorch {found['executorch']}, Python {found['python']}",
        f"processor: {found['processor']}",
        _line("compile", found["compile"]),
    ]
    return lines + [_line(f"backend {name}", about) for name, about in found["backends"].items()]


def _line(name: str, about: dict[str, Any]) -> str:
    if not about["works"]:
        return f"{name}: does not work here: {about['missing']}"
    return f"{name}: works{'; ' + about['text'] if 'text' in about else ''}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _compiling() -> dict[str, Any]:
    missing = [package for package in _COMPILE if _version(package) == "not installed"]
    if missing:
        return {"works": False, "missing": f"{', '.join(missing)}; run: pip install 'doubleweave[compile]'"}
    return {"works": True, "text": ", ".join(f"{package} {version(package)}" for package in _COMPILE)}
