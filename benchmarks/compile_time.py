"""Wall time and peak memory of `doubleweave compile smollm2`, bounded and static, each in a fresh process.

Memory is that of all its processes together, sampled ten times a second: the sum of their resident memory
(pages they share count once for each: an upper bound, held against the target) and of their proportional share.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import finish, note, parser, run, table, target
from compile_run import timed_compile

TARGET_S = {"bounded": 120.0, "static": 240.0}
TARGET_BYTES = 6e9


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
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        options = ["--quantize", args.quantize, "--shape", shape]
        found = timed_compile(args.source, Path(folder) / "program", options)
    return {
        "wall_s": target(found.wall_s, TARGET_S[shape], at_least=False),
        "peak_rss_bytes": target(found.peak_rss_bytes, TARGET_BYTES, at_least=False),
        "peak_pss_bytes": found.peak_pss_bytes,
        "other_cpu": found.other_cpu,
        "summary": found.summary,
    }


if __name__ == "__main__":
    run(main)
