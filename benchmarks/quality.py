"""How far the CPU's recipes are from float32: perplexity, divergence and next tokens, over texts of several kinds.

Every recipe is computed by the split that is lowered, in eager torch, which the check of a compile holds programs
against; so neither the cache's format nor kernels move a number. Divergence (of float32's next token, in nats) and
equal next tokens say more than perplexity does, which noise moves by half a percent either way.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, note, parser, run, table, target
from torch import Tensor

from doubleweave.check.quick_weights import quick_modules
from doubleweave.compiler.backends import backends
from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.pipeline_llm import splits_of
from doubleweave.compiler.quantize import grids
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import rows
from doubleweave.sources import load

CHUNK = 256
RECIPES = ("8da8w", "8da4w")
FORGOTTEN = "8da4w, from 16 bits"
TEXTS = {
    "prose": ("tests/data/essay.txt",),
    "documentation": ("docs/design.md", "docs/memory.md"),
    "code": ("src/doubleweave/schedule/choice.py", "src/doubleweave/compiler/split/split_llm.py"),
}
# Perplexity over float32, at most.
LIMITS = {"8da8w": 0.004, "8da4w": 0.010, FORGOTTEN: 0.10}


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        exact = split_of(args.source, "none", Path(folder))
        texts = {name: tokens_of(Path(folder), files, args.tokens) for name, files in TEXTS.items()}
        note(f"float32: {', '.join(f'{name} {ids.shape[1]} tokens' for name, ids in texts.items())}")
        wanted = {name: log_probabilities(exact, ids) for name, ids in texts.items()}
        found: dict[str, Any] = {}
        for recipe in (*RECIPES, FORGOTTEN):
            note(recipe)
            with forgotten() if recipe == FORGOTTEN else nullcontext():
                split = split_of(args.source, recipe.partition(",")[0], Path(folder), recipe == FORGOTTEN)
                found[recipe] = {
                    name: compared(wanted[name], log_probabilities(split, ids), ids)
                    for name, ids in texts.items()
                }
    lines = [["recipe", "text", "perplexity", "divergence", "same next tokens"]]
    for recipe, by_text in found.items():
        for name, each in by_text.items():
            lines.append(
                [
                    recipe,
                    name,
                    f"{each['perplexity']:+.2%}",
                    f"{each['divergence']:.4f}",
                    f"{each['same']:.1%}",
                ]
            )
    targets = {
        recipe: target(max(each["perplexity"] for each in found[recipe].values()), limit, at_least=False)
        for recipe, limit in LIMITS.items()
    }
    finish(
        "quality",
        [table(lines)],
        {"source": args.source, "tokens": args.tokens, "found": found, "targets": targets},
    )


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--source", default="smollm2", help="a model with a tokenizer (default: smollm2)")
    p.add_argument(
        "--tokens", type=int, default=1536, metavar="N", help="the most of each text (default 1536)"
    )
    return p.parse_args()


def split_of(source: str, recipe: str, folder: Path, in_float16: bool = False) -> TorchSplit:
    model = load(source)
    if in_float16:
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.copy_(parameter.to(torch.float16))
    options = Options(backends()["xnnpack"], recipe, rows(1, 128), model.max_context, cache="float32")
    return splits_of(model, options, folder, lambda what, done, total: None).lowered


def tokens_of(folder: Path, files: tuple[str, ...], most: int) -> Tensor:
    """Token ids, int64 [1, T]."""
    import tokenizers

    text = "".join((ROOT / name).read_text() for name in files)
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return torch.tensor([ids[:most]])


@torch.no_grad()
def log_probabilities(split: TorchSplit, ids: Tensor) -> Tensor:
    """[T, vocab] of the token behind each."""
    chunks = run_chunks(split, torch.split(ids, CHUNK, dim=1), quick_modules(split))
    return torch.cat(list(chunks), dim=1)[0].log_softmax(dim=-1)


def compared(wanted: Tensor, found: Tensor, ids: Tensor) -> dict[str, float]:
    targets = ids[0, 1:, None]
    losses = [-each[:-1].gather(1, targets).mean() for each in (found, wanted)]
    return {
        "perplexity": float((losses[0] - losses[1]).exp()) - 1,
        "divergence": float((wanted.exp() * (wanted - found)).sum(dim=-1).mean()),
        "same": float((wanted.argmax(dim=-1) == found.argmax(dim=-1)).float().mean()),
    }


@contextmanager
def forgotten() -> Iterator[None]:
    """Meanwhile no weight is known to have been quantized before: what a source of 16 bits would be."""
    tolerance = grids._TOLERANCE
    grids._TOLERANCE = -1.0
    try:
        yield
    finally:
        grids._TOLERANCE = tolerance


if __name__ == "__main__":
    run(main)
