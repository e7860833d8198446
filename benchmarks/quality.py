"""How far the CPU's recipes are from float32: perplexity, divergence and next tokens, over texts of several kinds.

Every recipe is computed by the split that is lowered, in eager torch, which the check of a compile holds programs
against; so neither the cache's format nor kernels move a number. Divergence (of float32's next token, in nats) and
equal next tokens say more than perplexity does, which noise moves by half a percent either way.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, note, parser, run, table, target
from torch import Tensor

from doubleweave.check.quick_weights import quick_modules
from doubleweave.compiler.backends import backends
from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.pipeline_llm import splits_of
from doubleweave.compiler.quantize.calibration import Calibration
from doubleweave.compiler.quantize.channels import find_channels
from doubleweave.compiler.quantize.smooth import scaled, smoothed
from doubleweave.compiler.quantize.tables import quantize_tables
from doubleweave.compiler.quantize.weights import in_groups, quantize
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.manifest import TOKENIZER_FILE
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
        exact = split_of(args.source, Path(folder))
        texts = {name: tokens_of(Path(folder), files, args.tokens) for name, files in TEXTS.items()}
        note(f"float32: {', '.join(f'{name} {ids.shape[1]} tokens' for name, ids in texts.items())}")
        wanted = {name: log_probabilities(exact, ids) for name, ids in texts.items()}
        found: dict[str, Any] = {}
        for recipe in (*RECIPES, FORGOTTEN):
            note(recipe)
            source = without_grids(exact) if recipe == FORGOTTEN else exact
            split = quantized(source, recipe.partition(",")[0], Path(folder))
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


def split_of(source: str, folder: Path) -> TorchSplit:
    model = load(source)
    options = Options(backends()["xnnpack"], "none", rows(1, 128), model.max_context)
    return splits_of(model, options, folder, lambda what, done, total: None).lowered


def quantized(split: TorchSplit, recipe: str, folder: Path) -> TorchSplit:
    """As the pipeline of a compile does it."""
    text = Calibration(folder / TOKENIZER_FILE, CHUNK, split_vocabulary(split)).first_tokens(CHUNK)
    return quantize_tables(quantize(smoothed(split, text, in_groups(split, recipe) or ()), recipe))


def split_vocabulary(split: TorchSplit) -> int:
    (output,) = (value for value in split.split.values if value.kind == "output")
    return int(output.shape[-1])


def without_grids(split: TorchSplit) -> TorchSplit:
    """The same numbers from weights in float16 that lie on no grid: each channel is moved by up to 5%."""
    found = find_channels(split)
    generator = torch.Generator().manual_seed(0)
    factors = [torch.rand(int(each.of_column.max()) + 1, generator=generator) / 10 + 0.95 for each in found]
    moved = scaled(split, found, factors)
    rounded = {
        name: tuple(
            each.to(torch.float16).to(each.dtype) if each.ndim > 1 else each for each in moved.weights[name]
        )
        for name in moved.weights
    }
    return replace(moved, weights=rounded)


def tokens_of(folder: Path, files: tuple[str, ...], most: int) -> Tensor:
    """Token ids, int64 [1, T]."""
    import tokenizers

    text = "".join((ROOT / name).read_text() for name in files)
    ids = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode(text).ids
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


if __name__ == "__main__":
    run(main)
