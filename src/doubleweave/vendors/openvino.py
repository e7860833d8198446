"""Intel's OpenVINO run time: found in its Python package, and made known to ExecuTorch's delegate.

The delegate loads libopenvino_c.so when its first method is loaded, by the path in OPENVINO_LIB_PATH. A compiled model
is read by the version that compiled it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from doubleweave.errors import BackendError
from doubleweave.vendors.library import Library, Segments

DEVICES = ("CPU", "GPU", "NPU")
_LIBRARY = "OPENVINO_LIB_PATH"
_MOST_ISA = "OV_CPU_MAX_ISA"
_INSTALL = "run: pip install 'doubleweave[openvino]'"


class OpenVino(NamedTuple):
    """An installed OpenVINO; `library` is its libopenvino_c.so."""

    library: Path
    version: str


def find_openvino() -> OpenVino:
    """The installed OpenVINO; raises BackendError where there is none."""
    spec = importlib.util.find_spec("openvino")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "libs"
    found = sorted(folder.glob("libopenvino_c.so*")) if folder is not None else []
    if not found:
        raise BackendError(f"OpenVINO is not installed; {_INSTALL}")
    try:
        return OpenVino(found[0], version("openvino"))
    except PackageNotFoundError:
        return OpenVino(found[0], "unknown")


def load_openvino(*, in_float32: bool = False) -> None:
    """Tell the delegate where OpenVINO is, before its first method is loaded; raises BackendError.

    On a CPU with bfloat16 OpenVINO computes in that, and the delegate has no option for it. `in_float32` keeps
    instructions of bfloat16 from it, for the whole process, unless the user has said which it may use.
    """
    if not os.environ.get(_LIBRARY):
        os.environ[_LIBRARY] = str(find_openvino().library)
    if in_float32:
        os.environ.setdefault(_MOST_ISA, "AVX512_CORE_VNNI")


def check_nncf() -> None:
    """Raises BackendError where NNCF, which quantizes for OpenVINO, is not installed."""
    if not _has_nncf():
        raise BackendError(
            f"nncf, which makes 8-bit weights, is not installed; {_INSTALL}, or use --quantize none"
        )


def _has_nncf() -> bool:
    return importlib.util.find_spec("nncf") is not None


@cache
def available_devices() -> tuple[str, ...]:
    """The devices that OpenVINO finds on this machine, such as CPU; raises BackendError.

    Another process asks: OpenVINO's threads do not outlive a fork, and compiling forks.
    """
    find_openvino()
    code = "from openvino import Core; print(*Core().available_devices)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"OpenVINO cannot be loaded ({reason}); {_INSTALL}")
    return tuple(dict.fromkeys(name.partition(".")[0] for name in done.stdout.split()))


def check_device(device: str) -> None:
    """Raises BackendError for a device that is not on this machine."""
    if device not in available_devices():
        raise BackendError(
            f"device {device}: OpenVINO {find_openvino().version} finds {', '.join(available_devices())} here; "
            "use a machine that has the device and its driver, or device CPU"
        )


def _load(segments: Segments) -> None:
    load_openvino(in_float32=all(segment.recipe == "none" for segment in segments))


def _examine() -> dict[str, Any]:
    try:
        found, devices = find_openvino(), available_devices()
    except BackendError as error:
        return {"works": False, "missing": str(error)}
    text = f"OpenVINO {found.version}; devices {', '.join(devices)}"
    return {
        "works": True,
        "text": text if _has_nncf() else f"{text}; --quantize none alone, for nncf is not installed",
        "version": found.version,
        "devices": list(devices),
    }


LIBRARY = Library(is_npu=True, load=_load, examine=_examine)
