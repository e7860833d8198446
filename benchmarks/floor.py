"""How fast SmolLM2 could be on this machine, and how near Doubleweave comes.

Two floors of time. The hard one: operations over what the arithmetic units can do (measured with operands in
registers), bytes over what memory can deliver. The soft one: operations over what a good matrix product
really reaches (float32: numpy's BLAS; int8: torch._int_mm, where torch is installed). Prefill is bound by
operations, decode by bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import BenchmarkError, Prompts, finish, note, parser, program_folder, run, table
from machine import OtherCpu
from workers import Workers

_PRODUCT = (512, 576, 1536)  # rows, inputs, outputs: a gate projection at 512 tokens


@dataclass(frozen=True)
class Model:
    """SmolLM2-135M's sizes, and what it has to compute and read at least."""

    layers: int = 30
    hidden: int = 576
    query_width: int = 9 * 64
    key_value_width: int = 3 * 64
    mlp: int = 1536
    vocab: int = 49152

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's linears: queries and output, keys and values, gate, up and down."""
        attention = 2 * self.hidden * self.query_width + 2 * self.hidden * self.key_value_width
        return attention + 3 * self.hidden * self.mlp

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    def linear_ops(self, tokens: int) -> int:
        """A multiply and an add for each weight and token; of the last layer only keys and values are needed
        for all tokens, and the head for the last token alone."""
        last = tokens * 2 * self.hidden * self.key_value_width
        last += self.layer_weights - 2 * self.hidden * self.key_value_width
        return 2 * (tokens * (self.layers - 1) * self.layer_weights + last + self.head_weights)

    def attention_ops(self, tokens: int) -> int:
        """Causal, both products: token t looks at t + 1 tokens (the last layer: the last token only)."""
        pairs = tokens * (tokens + 1) // 2
        return 4 * self.query_width * ((self.layers - 1) * pairs + tokens)

    def weight_bytes(self, bytes_per_weight: float = 1.0) -> int:
        """Bytes of weights that one token reads: all layers and the head (of the embedding, one row)."""
        return round((self.layers * self.layer_weights + self.head_weights) * bytes_per_weight)

    def cache_bytes(self, tokens: int, bytes_per_value: int = 4) -> int:
        """Bytes of keys and values that one token reads when `tokens` are cached, in float32."""
        return self.layers * 2 * self.key_value_width * tokens * bytes_per_value


def main() -> None:
    args = arguments()
    if args.product_of:
        print(json.dumps(matrix_product(args.product_of, args.threads)))
        return
    program = program_folder(args)
    cpu = OtherCpu(lambda: ())
    hard, soft = peaks(args), products(args)
    other_cpu = cpu.lap()
    measured = measure(args, program)
    model = Model()
    work = {
        "linear_ops": model.linear_ops(args.prompt_len),
        "attention_ops": model.attention_ops(args.prompt_len),
        "weight_bytes": model.weight_bytes(),
        "cache_bytes": model.cache_bytes(args.prompt_len),
    }
    floors = {
        "prefill hard": prefill_s(work, hard["int8_ops"], hard["float32_ops"]),
        "prefill soft": prefill_s(work, soft["int8_ops"], soft["float32_ops"]),
        "decode": decode_s(work, hard["read_bytes"]),
    }
    lines = report(args, hard, soft, work, floors, measured)
    finish("floor", [*lines, f"other processes used {other_cpu:.0%} of the machine"], {
        "threads": args.threads, "prompt_tokens": args.prompt_len, "work": work, "peak": hard, "product": soft,
        "floor_s": floors, "measured_s": measured, "other_cpu": other_cpu,
    })  # fmt: skip


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--prompt-len", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    p.add_argument("--rounds", type=int, default=9, metavar="R", help="runs of Doubleweave (default 9)")
    p.add_argument("--product-of", choices=("float32", "int8"), help=argparse.SUPPRESS)
    return p.parse_args()


def peaks(args: argparse.Namespace) -> dict[str, float | None]:
    """Operations and bytes a second that the machine can do at most, from floor_peak.c."""
    source, program = Path(__file__).parent / "floor_peak.c", args.cache / "floor_peak"
    args.cache.mkdir(parents=True, exist_ok=True)
    try:
        build = [
            os.environ.get("CC", "cc"),
            "-O3",
            "-march=native",
            "-pthread",
            str(source),
            "-o",
            str(program),
        ]
        subprocess.run(build, check=True, capture_output=True, text=True)
        done = subprocess.run([str(program), str(args.threads)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{source}: {error.stderr.strip() or error}") from None
    except FileNotFoundError as error:
        raise BenchmarkError(f"{error.filename}: no C compiler; set CC") from None
    found: dict[str, float | None] = json.loads(done.stdout)
    return found


def products(args: argparse.Namespace) -> dict[str, float | None]:
    """Operations a second of real matrix products, each library in a process of its own."""
    found = {}
    for kind in ("float32", "int8"):
        command = [sys.executable, __file__, "--product-of", kind, "--threads", str(args.threads)]
        threads = {
            name: str(args.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
        found[f"{kind}_ops"] = json.loads(done.stdout) if done.returncode == 0 else None
        if done.returncode:
            note(f"no {kind} product: {done.stderr.strip().splitlines()[-1]}")
    return found


def matrix_product(kind: str, threads: int, seconds: float = 2.0) -> float:
    """Best operations a second of one product of _PRODUCT's sizes, tried over and over."""
    rows, inputs, outputs = _PRODUCT
    if kind == "float32":
        import numpy as np

        a, b = np.ones((rows, inputs), np.float32), np.ones((inputs, outputs), np.float32)
        c = np.empty((rows, outputs), np.float32)

        def product() -> Any:
            return np.matmul(a, b, out=c)
    else:
        import torch

        torch.set_num_threads(threads)
        x = torch.ones((rows, inputs), dtype=torch.int8)
        y = torch.ones((outputs, inputs), dtype=torch.int8).t()

        def product() -> Any:
            return torch._int_mm(x, y)

    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inputs * outputs / best


def measure(args: argparse.Namespace, program: Path) -> dict[str, float]:
    """Doubleweave's own medians, as a wavefront: prefill, and one decoded token after it."""
    gen, prompts = 32, Prompts(program)
    with Workers(args.cache / "logs") as workers:
        worker = workers.start(
            "floor",
            "serve_doubleweave.py",
            str(program),
            "--schedule",
            "wavefront",
            "--threads",
            str(args.threads),
        )
        runs = [
            worker.ask("prefill_decode", ids=prompts.take(args.prompt_len), gen=gen)
            for _ in range(args.rounds + 2)
        ][2:]
    return {
        "prefill": statistics.median(one["prefill_s"] for one in runs),
        "decode": statistics.median(one["decode_s"] / gen for one in runs),
    }


def prefill_s(work: dict[str, int], int8_ops: float | None, float32_ops: float | None) -> float | None:
    """Linears in 8 bits and attention in float32, one after the other at full rate."""
    if int8_ops is None or float32_ops is None:
        return None
    return work["linear_ops"] / int8_ops + work["attention_ops"] / float32_ops


def decode_s(work: dict[str, int], read_bytes: float | None) -> float | None:
    """All weights and the whole cache read once, at full rate."""
    return None if read_bytes is None else (work["weight_bytes"] + work["cache_bytes"]) / read_bytes


def report(
    args: argparse.Namespace,
    hard: dict[str, float | None],
    soft: dict[str, float | None],
    work: dict[str, int],
    floors: dict[str, float | None],
    measured: dict[str, float],
) -> list[str]:
    def giga(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e9:.1f}"

    machine = [
        ["this machine, 10^9 a second", "at most", "matrix product"],
        ["int8 operations", giga(hard["int8_ops"]), giga(soft["int8_ops"])],
        ["float32 operations", giga(hard["float32_ops"]), giga(soft["float32_ops"])],
        ["bytes read", giga(hard["read_bytes"]), "-"],
    ]
    times = [["time", "floor ms", "measured ms", "floor / measured"]]
    for name, floor in floors.items():
        took = measured[name.split()[0]]
        shown = ["-", "-"] if floor is None else [f"{floor * 1e3:.1f}", f"{floor / took:.0%}"]
        times.append([name, shown[0], f"{took * 1e3:.1f}", shown[1]])
    return [
        f"{args.prompt_len} tokens: {work['linear_ops'] / 1e9:.1f} G operations in linears (int8), "
        f"{work['attention_ops'] / 1e9:.1f} G in attention (float32); a decoded token reads "
        f"{work['weight_bytes'] / 1e6:.0f} MB of weights and {work['cache_bytes'] / 1e6:.0f} MB of cache",
        "",
        table(machine),
        "",
        table(times),
    ]


if __name__ == "__main__":
    run(main)
