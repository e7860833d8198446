"""Qualcomm's QNN libraries on this machine: found, their version checked, and loaded into the process.

ExecuTorch opens "libQnnHtp.so" and "libQnnSystem.so" by name when a QNN backend starts, which gives it libraries of
that name that are loaded already. It is built against SDK 2.37. In newer SDKs a struct of the device's creation has
another layout, so they are loaded behind a library of ours that converts it and passes everything else on
(native/qnn/forward_htp.cpp). This file needs no torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from doubleweave.errors import BackendError
from doubleweave.ir.cache_folder import user_cache

BUILT_FOR = (2, 37)  # the SDK that ExecuTorch 1.5 is built against
OLDEST = (2, 28)
NEWEST = (2, 51)  # the newest that was tried
SOCS = ("SM8550", "SM8650", "SM8750", "SM8850")  # Snapdragon 8 Gen 2 and 3, 8 Elite, 8 Elite Gen 5
HTP, SYSTEM, SAVER = "libQnnHtp.so", "libQnnSystem.so", "libQnnSaver.so"
# Contexts that a process may hold on a phone: 66 failed to load, and up to about 50 do (pytorch/executorch#14985).
MOST_CONTEXTS = 50
INSTALL = (
    "run: pip install 'doubleweave[qnn]' (Linux x86-64), or set QNN_SDK_ROOT to the folder of Qualcomm's SDK"
)


@dataclass(frozen=True)
class Sdk:
    """Qualcomm's libraries: their origin as doctor shows it, their folder, the version, such as (2, 47), and the build,
    such as "2.47.0.260601114230"."""

    origin: str
    folder: Path
    version: tuple[int, int]
    build: str

    @property
    def is_forwarded(self) -> bool:
        """Whether the SDK is newer than ExecuTorch's, so that it needs the forwarding library."""
        return self.version > BUILT_FOR


@cache
def find_sdk() -> Sdk:
    """The SDK in QNN_SDK_ROOT, else the SDK that ExecuTorch has downloaded, else that of the package onnxruntime-qnn.

    Raises BackendError for no SDK, and for an SDK that is too old or too new.
    """
    for origin, folder in _places():
        if (folder / HTP).is_file():
            return _checked(origin, folder)
        if origin == "QNN_SDK_ROOT":
            raise BackendError(f"QNN_SDK_ROOT: found no {HTP} in {folder}; set it to the SDK's own folder")
    raise BackendError(f"Qualcomm's QNN libraries are not installed; {INSTALL}")


def load_sdk() -> Sdk:
    """Load the libraries into this process, so that ExecuTorch's QNN backend finds them; returns which they are.

    Raises BackendError as `find_sdk` does, and where a library cannot be loaded.
    """
    sdk = find_sdk()
    _load(sdk)
    return sdk


def keep_from_downloading() -> None:
    """Keep ExecuTorch from downloading an SDK, which it does where QNN_SDK_ROOT is not set; an empty value will do."""
    os.environ.setdefault("QNN_SDK_ROOT", "")


@cache
def _load(sdk: Sdk) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    import doubleweave._native  # noqa: F401  first: behind Qualcomm's libraries, torch's end in a crash

    keep_from_downloading()
    htp = sdk.folder / HTP
    if sdk.is_forwarded:
        os.environ["DOUBLEWEAVE_QNN_HTP"] = str(htp)
        htp = _forwarder()
    try:
        mode = os.RTLD_NOW | os.RTLD_LOCAL  # their C++ run time is not for other libraries, such as torch
        return ctypes.CDLL(str(htp), mode), ctypes.CDLL(str(sdk.folder / SYSTEM), mode)
    except OSError as error:
        raise BackendError(f"{sdk.folder}: Qualcomm's libraries cannot be loaded ({error})") from error


def _forwarder() -> Path:
    spec = find_spec("doubleweave._native")
    if spec is None or spec.origin is None:
        raise BackendError("the native part of doubleweave is not installed; install the package again")
    path = Path(spec.origin).parent / "qnn" / HTP
    if not path.is_file():
        raise BackendError(f"{path} is missing, which SDKs after 2.37 need; install the package again")
    return path


def _places() -> list[tuple[str, Path]]:
    """Where an SDK's x86 libraries may be, in the order of preference."""
    places = []
    if root := os.environ.get("QNN_SDK_ROOT"):
        places.append(("QNN_SDK_ROOT", Path(root) / "lib" / "x86_64-linux-clang"))
    staged = Path(os.environ.get("QNN_STAGING_DIR") or user_cache() / "executorch" / "qnn")
    for downloaded in sorted(staged.glob("sdk-*")):
        places.append(("downloaded by ExecuTorch", downloaded / "lib" / "x86_64-linux-clang"))
    spec = find_spec("onnxruntime_qnn") if is_host() else None
    if spec is not None and spec.submodule_search_locations:
        places.append(("onnxruntime-qnn", Path(spec.submodule_search_locations[0])))
    return places


def is_host() -> bool:
    """Whether this is a machine with Qualcomm's compiler and emulator for it."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _checked(origin: str, folder: Path) -> Sdk:
    # Each library carries the version; the small one is read first.
    build = next(filter(None, (_build_of(folder / name) for name in (SAVER, HTP))), None)
    if build is None:
        raise BackendError(
            f"{folder / HTP} does not say its version; install Qualcomm's SDK again, or {INSTALL}"
        )
    version = (int(build.split(".")[0]), int(build.split(".")[1]))
    if not OLDEST <= version <= NEWEST:
        kind = "old" if version < OLDEST else "new"
        raise BackendError(
            f"QNN SDK {build} ({origin}) is too {kind}: expected {_text(OLDEST)} to {_text(NEWEST)}; {INSTALL}"
        )
    return Sdk(origin, folder, version, build)


def _build_of(library: Path) -> str | None:
    """The version that a library carries, "2.47.0.260601114230"; loading it to ask would take its name for good."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = re.search(rb"v(2\.\d+\.\d+\.\d{6,})", data)
            return found[1].decode() if found else None
    except (OSError, ValueError):
        return None


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
