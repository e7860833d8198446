"""Installs the peers, each in its own virtual environment, and converts the weights for them.

What is there already, from the same requirements, is used again. It knows nothing of how they are measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from common import BenchmarkError, note
from workers import SERVE

LLAMA_CPP = ("llama-cpp-python==0.3.36",)
OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
# Export only: what reads the weights and writes OpenVINO's files needs torch, what runs them does not.
OPENVINO_EXPORT = (
    "optimum-intel[openvino]==2.2.0",
    "torch==2.13.*",
    "openvino==2026.4.1",
    "gguf",
    "accelerate",
)


def llama_cpp(cache: Path) -> Path:
    """The interpreter of llama.cpp's environment (pip builds it for this machine, about five minutes)."""
    return _environment(cache, "llama-cpp", LLAMA_CPP)


def openvino(cache: Path) -> Path:
    """The interpreter of OpenVINO GenAI's environment."""
    return _environment(cache, "openvino", OPENVINO)


def requantised_gguf(cache: Path, source: Path, kind: str, name: str = "smollm2") -> Path:
    """`source` as a GGUF of `kind` (Q8_0 or Q4_0), made by llama.cpp itself."""
    target = _weights(cache) / f"{name}.{kind}.gguf"
    if not target.exists():
        part = target.with_suffix(".part")
        requantise(cache, source, part, kind)
        part.rename(target)
    return target


def requantise(cache: Path, source: Path, target: Path, kind: str) -> None:
    """Write the GGUF `source` as one of `kind` (Q8_0, Q4_0 or Q4_K_S), by llama.cpp itself."""
    _run([llama_cpp(cache), SERVE / "make_gguf.py", source, target, kind], cache)


def openvino_int8(cache: Path, source: Path) -> Path:
    """`source` as OpenVINO files with int8 weights: dequantised to float32 by transformers, then exported by
    optimum-intel as its users do (int8, asymmetric, a scale for each output channel; embedding included)."""
    target = _weights(cache) / "smollm2-openvino-int8"
    if not target.exists():
        python = _environment(cache, "openvino-export", OPENVINO_EXPORT)
        # optimum-intel asks for torchvision, whose wheel fails to import beside a CPU-only torch and is not used.
        _run([python, "-m", "pip", "uninstall", "-q", "-y", "torchvision"], cache)
        plain, part = _weights(cache) / "smollm2-float32", target.with_suffix(".part")
        for folder in (plain, part):
            shutil.rmtree(folder, ignore_errors=True)
        _run([python, SERVE / "make_hugging_face.py", source, plain], cache)
        options = ["--model", str(plain), "--task", "text-generation-with-past", "--weight-format", "int8"]
        _run([python.parent / "optimum-cli", "export", "openvino", *options, part], cache)
        shutil.rmtree(plain)
        part.rename(target)
    return target


def _weights(cache: Path) -> Path:
    folder = cache / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _environment(cache: Path, name: str, requirements: Sequence[str]) -> Path:
    folder = cache / "environments" / name
    python, marker = folder / "bin" / "python", folder / "requirements.json"
    if marker.exists() and json.loads(marker.read_text()) == list(requirements):
        return python
    note(f"installing {', '.join(requirements)} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", folder], cache)
    _run([python, "-m", "pip", "install", "-q", *requirements], cache)
    marker.write_text(json.dumps(list(requirements)))
    return python


def _run(command: Sequence[str | Path], cache: Path) -> None:
    """Run a step of the installation; raises BenchmarkError with the last line of its log."""
    log = cache / "install.log"
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with log.open("a") as out:
        out.write(f"$ {' '.join(map(str, command))}\n")
        out.flush()
        done = subprocess.run(
            list(map(str, command)), stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=clean
        )
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise BenchmarkError(
            f"{' '.join(map(str, command))}: exit code {done.returncode}: {last} (log: {log})"
        )
