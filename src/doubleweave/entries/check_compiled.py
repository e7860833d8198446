"""Check a language model's program: whole, or, where the model is large, in parts.

Of a large model the first layers are compiled once more, with the same templates, and checked as a whole model is; as
many as have every kind of layer. Then each segment of the whole program is held against float32 on a few rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.check.all_layers import hold_weights
from doubleweave.check.language_model import Compiled, check_llm, refusal
from doubleweave.compiler.backends import backends
from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.free_memory import give_back_free_memory
from doubleweave.compiler.lower.lower import lower
from doubleweave.compiler.pipeline_llm import Splits, splits_of
from doubleweave.compiler.program_folder import Progress
from doubleweave.entries.llm_manifest import write_beside
from doubleweave.ir.check import Check
from doubleweave.ir.manifest import PROGRAM_FILE, Manifest
from doubleweave.sources.first_layers import enough_layers, first_layers

if TYPE_CHECKING:
    from doubleweave.compiler.lower.equal_structures import Key
    from doubleweave.compiler.lower.templates import Template
    from doubleweave.sources.model import Model

# Of weights in float32: a smaller model is run whole in less time than it takes to compile.
LARGE_BYTES = 2 << 30


def check_compiled(
    model: Model,
    options: Options,
    splits: Splits,
    templates: Mapping[Key, Template],
    folder: Path,
    manifest: Manifest,
    report: Progress,
    *,
    whole: bool,
) -> Check:
    """Check the program of `folder`, which has this manifest; raises CheckError.

    `whole`: a large model too is run with all its layers.
    """
    give_back_free_memory()
    compiled = _compiled(model, options, splits, folder)
    is_large = sum(weight.nbytes for weight in model.module.parameters()) >= LARGE_BYTES
    # Other backends would compile the first layers anew, for minutes, and may not run here.
    is_quick = all(backends()[segment.backend].serialized for segment in splits.lowered.split.segments)
    if whole or not is_large or not is_quick:
        return check_llm(compiled, report)
    count = enough_layers(model.module)
    found = None if count is None else _check_layers(model, options, splits, templates, folder, count, report)
    if found is None or count is None:
        return check_llm(compiled, report)
    give_back_free_memory()
    report("checking: the weights of all layers", 0, 1)
    if said := model.audit():
        raise refusal(compiled, said)
    return replace(found, layers=count, weights_noise=hold_weights(compiled, manifest, report))


def _check_layers(
    model: Model,
    options: Options,
    whole: Splits,
    templates: Mapping[Key, Template],
    folder: Path,
    count: int,
    report: Progress,
) -> Check | None:
    """Compile and check the first `count` layers; None where the model has segments that these do not have."""
    part = folder / "first_layers"
    part.mkdir()

    def tell(what: str, done: int, total: int) -> None:
        report(f"checking {count} layers: {what.removeprefix('checking: ')}", done, total)

    try:
        with first_layers(model.module, count):
            splits = splits_of(model, replace(options, is_part=True), part, tell)
            # Weights that are kept in other formats than the first layers' make structures of their own in what is
            # lowered: each is held against eager torch by itself.
            if {s.structure for s in whole.reference.split.segments} - {
                s.structure for s in splits.reference.split.segments
            }:
                return None
            lowered = lower(splits.lowered, part / PROGRAM_FILE, tell, templates)
            write_beside(model, options, splits, lowered, part)
            give_back_free_memory()
            few = _compiled(model, options, splits, part)
            # All weights are audited, not these alone.
            return check_llm(replace(few, audit=lambda: "", is_large=True), tell)
    finally:
        shutil.rmtree(part)


def _stores_otherwise(splits: Splits) -> bool:
    values = splits.lowered.split.values
    return any(value.kind == "cache" and value.dtype != "float32" for value in values)


def _compiled(model: Model, options: Options, splits: Splits, folder: Path) -> Compiled:
    return Compiled(
        model.name,
        model.module,
        model.vocab_size,
        options.max_context,
        splits.reference,
        splits.lowered,
        folder,
        is_float=options.recipe == "none" and not _stores_otherwise(splits),
        audit=model.audit,
        encode=splits.encode,
        rotary_border=splits.rotary_border,
    )
