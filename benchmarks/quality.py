"""How far the CPU's recipes are from float32: perplexity, divergence and equal next tokens, over held-out texts.

The texts are the package's, 16,674 tokens of SmolLM2; programs run as users run them. Divergence (of float32's next
token, in nats) and equal next tokens say more than perplexity does, which noise moves by half a percent either way.

What stands for a source of 16 bits is the same model in a GGUF of float16 whose channels were moved against one
another (moved_channels.py), so that no group of weights lies on a grid any more: by up to 5%, which leaves groups near
their grids, and by up to a factor of two, which leaves nothing of them; llama.cpp, which moves no channel back, feels
the second more. It quantizes these files to 4 bits itself, and its own logits are scored beside ours.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import peer_env
from common import compiled, finish, note, parser, run, smollm2_gguf, table, target
from moved_channels import write_moved
from workers import Worker, Workers

import doubleweave as dw
from doubleweave.ir.text_score import TextScore, together
from doubleweave.measure.perplexity import Logits, logits_of, score_text
from doubleweave.texts import held_out_texts

WINDOW = 1024
FILE = "Q4_1 file"
SPREADS = {"16 bits, moved by 5%": 0.05, "16 bits, moved by 2": 0.7}
RECIPES = ("8da8w", "8da4w")
LLAMA = ("Q4_0", "Q4_K_S")
ALL = "all"
# Perplexity over float32, at most; next tokens that are the same, at least.
LIMITS = {(FILE, "8da8w"): 0.004, (FILE, "8da4w"): 0.010, **{(source, "8da4w"): 0.10 for source in SPREADS}}
SAME = {(FILE, "8da8w"): 0.97}

Key = tuple[str, str]


def main() -> None:
    args = arguments()
    found: dict[Key, list[TextScore]] = {}
    sizes: dict[Key, int] = {}
    with tempfile.TemporaryDirectory() as name, Workers(args.cache / "logs") as workers:
        folder = Path(name)
        files = {FILE: smollm2_gguf()}
        for source, spread in SPREADS.items():
            files[source] = folder / f"{spread}.gguf"
            write_moved(smollm2_gguf(), files[source], spread)
        for source, path in files.items():
            exact = opened(folder / f"{source}-none", "none", path)
            for recipe in RECIPES:
                program = opened(folder / f"{source}-{recipe}", recipe, path)
                note(f"scoring {recipe} from {source}")
                logits = logits_of(program.session(threads=args.threads))
                found[source, recipe] = scores(args, exact, logits)
                sizes[source, recipe] = program.manifest.program_bytes
            for kind in LLAMA if source in SPREADS else ():
                file, key = folder / f"{source}-{kind}.gguf", (source, f"llama.cpp {kind}")
                peer_env.requantise(args.cache, path, file, kind)
                note(f"scoring llama.cpp's {kind} from {source}")
                worker = workers.start(
                    f"llama-logits-{source}-{kind}", "serve_llama_logits.py", str(file),
                    "--threads", str(args.threads), "--context", str(WINDOW),
                    python=peer_env.llama_cpp(args.cache),
                )  # fmt: skip
                found[key] = scores(args, exact, llama_logits(worker, folder / "logits.npy"))
                sizes[key] = file.stat().st_size
    report(args, found, sizes)


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--tokens", type=int, metavar="N", help="the most of each text (default: all of it)")
    return p.parse_args()


def opened(folder: Path, recipe: str, source: Path) -> dw.Program:
    program = dw.open(compiled(folder, "--quantize", recipe, "--no-check", source=str(source)))
    assert isinstance(program, dw.Program)
    return program


def scores(args: argparse.Namespace, exact: dw.Program, found: Logits) -> list[TextScore]:
    session = exact.session(threads=args.threads)
    texts = {name: exact.text.encode_raw(text)[: args.tokens] for name, text in held_out_texts().items()}
    step = min(session.score_rows, WINDOW)
    return [score_text(name, ids, WINDOW, step, found, logits_of(session)) for name, ids in texts.items()]


def llama_logits(worker: Worker, file: Path) -> Logits:
    def logits(ids: Sequence[int], step: int) -> Iterator[Any]:
        worker.ask("logits", ids=list(ids), out=str(file))
        rows = np.load(file, mmap_mode="r")
        for start in range(0, len(ids), step):
            yield rows[start : start + step]

    return logits


def report(args: argparse.Namespace, found: dict[Key, list[TextScore]], sizes: dict[Key, int]) -> None:
    lines = [["weights from", "recipe", "MB", "text", "perplexity", "divergence", "same next tokens"]]
    whole = {key: together(ALL, each) for key, each in found.items()}
    for key, each in found.items():
        for score in (*each, whole[key]):
            about = (*key, f"{sizes[key] / 1e6:.0f}") if score is each[0] else ("", "", "")
            lines.append([*about, score.text, f"{score.over:+.2%}", f"{score.kl:.4f}", f"{score.top1:.1%}"])
    targets = {
        f"perplexity, {recipe} from {source}": target(
            whole[source, recipe].over or 0.0, limit, at_least=False
        )
        for (source, recipe), limit in LIMITS.items()
    }
    targets |= {
        f"same next tokens, {recipe} from {source}": target(
            whole[source, recipe].top1 or 0.0, limit, at_least=True
        )
        for (source, recipe), limit in SAME.items()
    }
    for source, kind in itertools.product(SPREADS, LLAMA):
        ours, other = whole[source, "8da4w"], whole[source, f"llama.cpp {kind}"].kl or 0.0
        targets[f"divergence, 8da4w over llama.cpp's {kind}, from {source}"] = target(
            (ours.kl or 0.0) / other, 1.0, at_least=False
        )
    by_recipe = {
        f"{recipe} from {source}": {
            "bytes": sizes[source, recipe],
            "scores": [asdict(score) | {"over": score.over} for score in (*each, whole[source, recipe])],
        }
        for (source, recipe), each in found.items()
    }
    finish("quality", [table(lines)], {"found": by_recipe, "targets": targets})


if __name__ == "__main__":
    run(main)
