"""Write what lies beside a language model's program.pte: its manifest, and what doubleweave-run reads."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.compiler.backends.backend import Options
from doubleweave.ir.manifest import PROGRAM_FILE, TOKENIZER_FILE, Manifest, ModelInfo
from doubleweave.ir.seal import digest_of
from doubleweave.predict.find_profile import find_profile
from doubleweave.predict.run_file import write_run_file

if TYPE_CHECKING:
    from doubleweave.compiler.lower.lower import Lowering
    from doubleweave.compiler.pipeline_llm import Splits
    from doubleweave.sources.model import Model


def write_beside(model: Model, options: Options, splits: Splits, lowered: Lowering, folder: Path) -> Manifest:
    """The manifest of a program that is written and not checked."""
    from doubleweave.sources.encoder_decoder import Decoder

    manifest = Manifest(
        name=model.name,
        model=ModelInfo(
            model.vocab_size,
            options.max_context,
            model.eos_token_ids,
            model.chat_template,
            model.special_tokens,
            options.recipe,
            options.name,
            dict(options.own.get("keep", {})),
            splits.calibrated,
            model.module.start_token_ids if isinstance(model.module, Decoder) else (),
            splits.rotary_border,
        ),
        split=lowered.split,
        program_sha256=lowered.digest,
        program_bytes=(folder / PROGRAM_FILE).stat().st_size,
        state_sha256="",
        made_with={name: version(name) for name in ("doubleweave", "executorch", "torch", "transformers")},
        check=None,
        tokenizer_digest=digest_of(folder / TOKENIZER_FILE),
    )
    manifest.write(folder)
    write_run_file(folder, manifest, find_profile(folder, manifest))
    return manifest
