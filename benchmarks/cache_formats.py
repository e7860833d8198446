"""The formats that a cache keeps keys and values in: bytes, perplexity, and speed beside OpenVINO GenAI.

Perplexity is that of a text of some 8,000 tokens, the documentation in docs/. By float32 programs it shows what the
format alone changes; by 8da8w programs also how far other rounding moves it, whatever it comes from. Speed is that of
8da8w programs, one process a format, which take turns with OpenVINO GenAI (int8 weights, its own cache in 8 bits and
attention in bfloat16), paired by round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    DOUBLEWEAVE,
    ROOT,
    BenchmarkError,
    Prompts,
    compiled,
    finish,
    note,
    parser,
    run,
    spread,
    table,
)
from peers import add_contest, start_openvino, start_ours
from workers import Contest, Entrant, Workers

from doubleweave.ir.cache_format import CACHE_FORMATS

PEER = "openvino-int8"
LENGTHS = (2048, 7936)
TEXT_BYTES = 32_000  # of the documentation: about 8,000 tokens


def main() -> None:
    args = arguments()
    formats = args.format or list(CACHE_FORMATS)
    programs = {name: program(args, name, "8da8w") for name in formats}
    found: dict[str, Any] = {name: {"bytes_a_token": bytes_a_token(programs[name])} for name in formats}
    if not args.no_perplexity:
        text = args.cache / "documentation.txt"
        pages = sorted((ROOT / "docs").glob("*.md"))
        text.write_bytes(b"".join(page.read_bytes() for page in pages)[:TEXT_BYTES])
        for name in formats:
            note(f"perplexity with a cache in {name}")
            for recipe in ("none", "8da8w"):
                found[name][f"perplexity_{recipe}"] = perplexity(program(args, name, recipe), text)
    lengths = [] if args.no_speed else args.prompt_len or list(LENGTHS)
    lines = quality_lines(found)
    with Workers(args.cache / "logs") as workers:
        entrants = start(args, workers, programs, max(lengths) + args.gen + 8) if lengths else {}
        prompts = Prompts(programs[formats[0]])
        for length in lengths:
            contest = Contest(entrants, partial(prompts.take, length), args.gen)
            note(f"{length} prompt tokens, {args.gen} decoded, {args.rounds} rounds")
            contest.run(args.rounds, args.warmup)
            rows, result = speeds(contest, formats[0], length)
            found[str(length)] = result
            lines += ["", f"{length} tokens, {args.gen} decoded; ratios paired by round", table(rows)]
            lines.append(f"other processes used up to {max(contest.other_cpu):.0%} of the machine in a round")
    finish("cache_formats", lines, {"threads": args.threads, "rounds": args.rounds, "found": found})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--format", action="append", choices=CACHE_FORMATS, help="may be repeated (default: all)")
    p.add_argument(
        "--prompt-len", type=int, action="append", metavar="N", help="may be repeated (default 2048, 7936)"
    )
    p.add_argument("--no-perplexity", action="store_true", help="measure speed alone")
    p.add_argument("--no-speed", action="store_true", help="measure perplexity alone")
    p.add_argument("--no-peer", action="store_true", help="leave OpenVINO GenAI out")
    add_contest(p)
    return p.parse_args()


def program(args: argparse.Namespace, cache: str, recipe: str) -> Path:
    folder = args.cache / "programs" / f"smollm2-{recipe}-{cache}"
    return compiled(folder, "--quantize", recipe, "--cache", cache)


def bytes_a_token(folder: Path) -> int:
    done = subprocess.run(
        [*DOUBLEWEAVE, "inspect", str(folder), "--json"], capture_output=True, text=True, check=True
    )
    return sum(json.loads(done.stdout.splitlines()[-1])["cache"].values())


def perplexity(folder: Path, text: Path) -> float:
    done = subprocess.run(
        [*DOUBLEWEAVE, "score", str(folder), str(text), "--json"], capture_output=True, text=True
    )
    if done.returncode:
        raise BenchmarkError(
            f"{folder}: doubleweave score ended with {done.returncode}: {done.stderr[-500:]}"
        )
    return float(json.loads(done.stdout.splitlines()[-1])["perplexity"])


def quality_lines(found: dict[str, Any]) -> list[str]:
    rows = [["cache", "bytes a token", "MB at 7,936", "perplexity, float32", "change", "8da8w", "change"]]
    first = next(iter(found.values()))
    for name, each in found.items():
        cells = [name, f"{each['bytes_a_token']:,}", f"{each['bytes_a_token'] * 7936 / 1e6:.0f}"]
        for recipe in ("none", "8da8w"):
            if (value := each.get(f"perplexity_{recipe}")) is not None:
                cells += [f"{value:.3f}", f"{value / first[f'perplexity_{recipe}'] - 1:+.3%}"]
            else:
                cells += ["-", "-"]
        rows.append(cells)
    return [table(rows)]


def start(
    args: argparse.Namespace, workers: Workers, programs: dict[str, Path], context: int
) -> dict[str, Entrant]:
    entrants = {name: start_ours(args, workers, folder, f"cache-{name}") for name, folder in programs.items()}
    if not args.no_peer:
        entrants[PEER] = start_openvino(args, workers, context)
    return entrants


def speeds(contest: Contest, first: str, length: int) -> tuple[list[list[str]], dict[str, Any]]:
    """Rates and what they are over the first format and over the peer: as rows, and as plain data."""
    rows = [
        [
            "engine",
            "prefill tok/s",
            f"over {first}",
            "over OpenVINO",
            "decode tok/s",
            f"over {first}",
            "over OpenVINO",
        ]
    ]
    result: dict[str, Any] = {}
    for name, entrant in contest.entrants.items():
        cells, result[name] = [name], {}
        for what, tokens in (("prefill", length), ("decode", contest.gen)):
            rate = spread([tokens / seconds for seconds in getattr(entrant, f"{what}_s")])
            cells.append(f"{rate.median:.0f} [{rate.low:.0f}, {rate.high:.0f}]")
            result[name][f"{what}_tok_per_s"] = rate._asdict()
            for other in (first, PEER):
                if other not in contest.entrants or other == name:
                    cells.append("-")
                    continue
                ratio = spread(contest.ratios(name, other, f"{what}_s"))
                cells.append(str(ratio))
                result[name][f"{what}_over_{other}"] = ratio._asdict()
        rows.append(cells)
    return rows, result


if __name__ == "__main__":
    run(main)
