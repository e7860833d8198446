"""What works on this machine, and what to install for the rest. Needs no torch."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from doubleweave.errors import BackendError
from doubleweave.vendors.openvino_sdk import available_devices, find_openvino
from doubleweave.vendors.qnn_sdk import INSTALL, SOCS, Sdk, load_sdk

_COMPILE = ("torch", "transformers", "torchao")


def examine() -> dict[str, Any]:
    """Versions; whether compiling works; each backend, with "works" and, where it does not, "missing"."""
    return {
        "doubleweave": _version("doubleweave"),
        "python": platform.python_version(),
        "executorch": _version("executorch"),
        "processor": f"{platform.machine()}, {_threads()} threads",
        "compile": _compiling(),
        "backends": {
            "xnnpack": {"works": True},
            "portable": {"works": True},
            "qnn": _qnn(),
            "openvino": _openvino(),
        },
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


def _threads() -> int:
    from doubleweave import _native

    return _native.max_threads()


def _compiling() -> dict[str, Any]:
    missing = [package for package in _COMPILE if _version(package) == "not installed"]
    if missing:
        return {
            "works": False,
            "missing": f"{', '.join(missing)}; run: pip install 'doubleweave[compile]'",
        }
    return {"works": True, "text": ", ".join(f"{package} {version(package)}" for package in _COMPILE)}


def _qnn() -> dict[str, Any]:
    try:
        found = load_sdk()
    except BackendError as error:
        text = str(error)
        return {"works": False, "missing": text if INSTALL in text else f"{text}; {INSTALL}"}
    return {"works": True, "text": _sdk_text(found), **_sdk_dict(found)}


def _openvino() -> dict[str, Any]:
    try:
        found, devices = find_openvino(), available_devices()
    except BackendError as error:
        return {"works": False, "missing": str(error)}
    compresses = _version("nncf") != "not installed"
    text = f"OpenVINO {found.version}; devices {', '.join(devices)}"
    return {
        "works": True,
        "text": text if compresses else f"{text}; --quantize none alone, for nncf is not installed",
        "version": found.version,
        "devices": list(devices),
    }


def _sdk_dict(sdk: Sdk) -> dict[str, Any]:
    return {
        "sdk": sdk.build,
        "origin": sdk.origin,
        "folder": str(sdk.folder),
        "forwarded": sdk.is_forwarded,
        "socs": list(SOCS),
    }


def _sdk_text(sdk: Sdk) -> str:
    forwarded = "behind the forwarding library" if sdk.is_forwarded else "used as it is"
    return (
        f"SDK {sdk.build} ({sdk.origin}), {forwarded}; chips {', '.join(SOCS)}; runs on the HTP emulator here"
    )
