"""Score a compiled language model over the texts that come with the package, against its float32 split.

The program runs where it can; a phone's build and one for the emulator are judged by their split in eager torch, as
their check holds them against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from doubleweave.check.quick_weights import quick_modules
from doubleweave.compiler.pipeline_llm import Splits
from doubleweave.compiler.program_folder import Progress
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.manifest import TOKENIZER_FILE, Manifest
from doubleweave.ir.text_score import TextScore
from doubleweave.measure.perplexity import Logits, logits_of, score_text
from doubleweave.runtime.open import open_llm
from doubleweave.texts import CALIBRATION, calibration_text, held_out_texts
from doubleweave.vendors.library import emulator_of, missing_here

# Tokens that are scored on their own, and of them those that run at a time.
_WINDOW, _STEP = 1024, 128


def score_compiled(
    splits: Splits, folder: Path, manifest: Manifest, report: Progress
) -> tuple[TextScore, ...]:
    """The scores of the calibration text and of each held-out one."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    split = manifest.split
    if emulator_of(split) or missing_here(split):
        found = _eager(splits.lowered)
    else:
        found = logits_of(open_llm(folder, keeps_packed=False).session())
    exact = _eager(splits.reference)
    assert manifest.model is not None
    window = min(_WINDOW, manifest.model.max_context)
    texts = {CALIBRATION: calibration_text(), **held_out_texts()}
    ids = {name: tokenizer.encode(text, add_special_tokens=False).ids for name, text in texts.items()}
    total = sum(map(len, ids.values()))
    done = 0
    scores = []

    def counted(logits: Logits) -> Logits:
        def run(some: Sequence[int], step: int) -> Iterator[Any]:
            nonlocal done
            for rows in logits(some, step):
                yield rows
                done += len(rows)
                report("scoring", done, total)

        return run

    for name, text in ids.items():
        scores.append(score_text(name, text, window, _STEP, counted(found), exact))
    return tuple(scores)


def _eager(torch_split: TorchSplit) -> Logits:
    import torch

    modules = quick_modules(torch_split)

    def logits(ids: Sequence[int], step: int) -> Iterator[Any]:
        for found in run_chunks(torch_split, torch.split(torch.tensor([ids]), step, dim=1), modules):
            yield found[0].numpy()

    return logits
