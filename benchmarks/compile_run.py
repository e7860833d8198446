"""One `doubleweave compile` in a process of its own, with its time and the memory of all its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import DOUBLEWEAVE, BenchmarkError
from machine import OtherCpu, session_memory_bytes

_SAMPLE_S = 0.1


class Compiled(NamedTuple):
    """Seconds, bytes, the share of the processor that others used, and what --json printed."""

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_pss_bytes: int
    other_cpu: float
    summary: dict[str, Any]


def timed_compile(source: str | Path, folder: Path, options: Sequence[str]) -> Compiled:
    """Compile `source` into `folder`; memory is sampled ten times a second."""
    command = [*DOUBLEWEAVE, "compile", str(source), "-o", str(folder), *options, "--json"]
    with tempfile.TemporaryFile("w+") as out:
        start, used = time.perf_counter(), _children_cpu()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True)
        peak_rss = peak_pss = 0
        cpu = OtherCpu(lambda: ())
        try:
            while process.poll() is None:
                rss, pss = session_memory_bytes(process.pid)
                peak_rss, peak_pss = max(peak_rss, rss), max(peak_pss, pss)
                time.sleep(_SAMPLE_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        wall, used = time.perf_counter() - start, _children_cpu() - used
        out.seek(0)
        said = out.read().strip().splitlines()
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit code {process.returncode}")
    return Compiled(wall, used, peak_rss, peak_pss, cpu.lap(), json.loads(said[-1]))


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system
