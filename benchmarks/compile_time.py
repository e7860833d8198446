"""Wall time and peak memory of `doubleweave compile smollm2`, bounded and static, each in a fresh process.

Memory is that of all its processes together, sampled ten times a second: the sum of their resident memory
(pages they share count once for each: an upper bound, held against the target) and of their proportional share.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from common import DOUBLEWEAVE, BenchmarkError, finish, note, parser, run, table, target
from machine import OtherCpu, session_memory_bytes

TARGET_S = {"bounded": 120.0, "static": 240.0}
TARGET_BYTES = 6e9
_SAMPLE_S = 0.1


def main() -> None:
    args = arguments()
    results: dict[str, Any] = {}
    rows = [
        [
            "shape",
            "wall s",
            "target s",
            "peak RSS GB",
            "peak PSS GB",
            "target GB",
            "program MiB",
            "others' CPU",
        ]
    ]
    for shape in args.shape or TARGET_S:
        note(f"compiling {args.source} {args.quantize} {shape}")
        result = results[shape] = measure(args, shape)
        rows.append([
            shape, f"{result['wall_s']['value']:.1f}", f"{TARGET_S[shape]:.0f} {met(result['wall_s'])}",
            f"{result['peak_rss_bytes']['value'] / 1e9:.2f}", f"{result['peak_pss_bytes'] / 1e9:.2f}",
            f"{TARGET_BYTES / 1e9:.0f} {met(result['peak_rss_bytes'])}",
            f"{result['summary']['program_bytes'] / 2**20:.0f}", f"{result['other_cpu']:.0%}",
        ])  # fmt: skip
    finish(
        "compile_time", [table(rows)], {"source": args.source, "quantize": args.quantize, "shapes": results}
    )


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("source", nargs="?", default="smollm2", help="what to compile (default smollm2)")
    p.add_argument("--quantize", default="8da8w", metavar="RECIPE", help="default 8da8w")
    p.add_argument(
        "--shape",
        action="append",
        choices=list(TARGET_S),
        help="only this shape; may be repeated (default: both)",
    )
    return p.parse_args()


def met(goal: dict[str, Any]) -> str:
    return "met" if goal["met"] else "not met"


def measure(args: argparse.Namespace, shape: str) -> dict[str, Any]:
    args.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as folder, tempfile.TemporaryFile("w+") as out:
        command = [*DOUBLEWEAVE, "compile", args.source, "-o", str(Path(folder) / "program")]
        command += ["--quantize", args.quantize, "--shape", shape, "--json"]
        start = time.perf_counter()
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
        wall = time.perf_counter() - start
        out.seek(0)
        said = out.read().strip().splitlines()
        if process.returncode:
            raise BenchmarkError(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "wall_s": target(wall, TARGET_S[shape], at_least=False),
        "peak_rss_bytes": target(peak_rss, TARGET_BYTES, at_least=False),
        "peak_pss_bytes": peak_pss,
        "other_cpu": cpu.lap(),
        "summary": json.loads(said[-1]),
    }


if __name__ == "__main__":
    run(main)
