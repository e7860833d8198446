"""From a language model to its splits: in float32, and quantized, which is lowered."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.policy import DEFAULT_BACKEND
from doubleweave.compiler.program_folder import Progress
from doubleweave.errors import PolicyError
from doubleweave.ir.manifest import TOKENIZER_FILE
from doubleweave.ir.split import ENCODER, most_rows

if TYPE_CHECKING:
    from torch import Tensor

    from doubleweave.compiler.split.pieces import TorchSplit
    from doubleweave.sources.model import Model


class Splits(NamedTuple):
    """The split in float32, and as it is lowered: placed on its backends and quantized. `encode` makes the keys and
    values of an encoder's rows. `rotary_border` and `calibrated` are ModelInfo's."""

    reference: TorchSplit
    lowered: TorchSplit
    encode: Callable[[Tensor], Sequence[Tensor]]
    rotary_border: int
    calibrated: str


def splits_of(model: Model, options: Options, folder: Path, report: Progress) -> Splits:
    """Export, split and quantize; writes the tokenizer into `folder`. Raises SplitError, PolicyError, LowerError or,
    for a calibration text, InputError."""
    import torch

    from doubleweave.compiler.graph.encoded_rows import cut_encoded
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.graph.ops import GENERAL
    from doubleweave.compiler.graph.order_by_use import order_by_use
    from doubleweave.compiler.graph.rotary_lengths import rotary_border
    from doubleweave.compiler.graph.static_attention import MASK, inline_attention
    from doubleweave.compiler.quantize.best_grids import with_best_grids
    from doubleweave.compiler.quantize.calibration import PACKAGE_TEXT, Calibration
    from doubleweave.compiler.quantize.smooth import smoothed
    from doubleweave.compiler.quantize.stored import with_stored
    from doubleweave.compiler.quantize.tables import quantize_tables
    from doubleweave.compiler.split.cache_format import with_cache_format
    from doubleweave.compiler.split.join import joined
    from doubleweave.compiler.split.llm_rows import check_rows
    from doubleweave.compiler.split.split_encoder import encoded_example, split_encoder
    from doubleweave.compiler.split.split_llm import default_policy, split_llm
    from doubleweave.compiler.split.tied import tied_tables
    from doubleweave.sources.encoder_decoder import Decoder

    border = rotary_border(model.module.config, options.max_context)
    report("exporting the graph", 0, 1)
    most = most_rows(options.sizes)
    graph = export_llm(model.module, most, border > 0)
    if graph.graph.find_nodes(op="call_function", target=GENERAL):
        # The model's own operators see all keys: what its Python asks of their number has to hold for the longest text.
        graph = export_llm(model.module, options.max_context, border > 0)
    decoder = model.module if isinstance(model.module, Decoder) else None
    project = cut_encoded(graph) if decoder else None
    check_rows(graph, type(model.module).__name__)
    order_by_use(graph.graph)
    owners = owned_modules(model.module)
    if options.attention == "static":
        inline_attention(graph, options.max_context, options.backend.hidden_score)
        owners |= {MASK: MASK}
    encoded = decoder.most_rows(options.max_context) if decoder else 0
    policy = default_policy(options.sizes)
    torch_split = split_llm(graph, owners, policy, max_context=options.max_context, max_encoded=encoded)
    torch_split = replace(torch_split, tied=tied_tables(torch_split))
    if decoder and project:
        report("exporting the encoder", 0, 1)
        encoder = split_encoder(decoder, project, encoded)
        torch_split = replace(torch_split, encoded=encoded_example(decoder, project, torch_split.split))
    # Before quantizing: the calibration text is read with the saved tokenizer.
    if model.save_tokenizer is not None:
        _save_tokenizer(model.save_tokenizer, folder)
    calibration = Calibration(folder / TOKENIZER_FILE, most, model.vocab_size)
    text = calibration.first_tokens(options.max_context)
    source = torch_split
    if text and (rounding := options.backend.rounding(torch_split, options)) is not None:
        report("scaling channels", 0, 1)
        calibration.used.append(f"{text[0].shape[1]:,} tokens of {PACKAGE_TEXT}")
        grouped, unscaled, free, exponent = rounding
        torch_split, importance = smoothed(torch_split, text, grouped, unscaled, exponent)
        source = with_best_grids(torch_split, free, importance)
        calibration = replace(calibration, importance=importance)
    report(f"quantizing ({options.recipe})", 0, 1)
    assert options.backend.place is not None
    lowered = options.backend.place(source, options, calibration, report)
    if options.recipe != "none":
        lowered = quantize_tables(lowered, options.table or "int8")
    lowered = with_stored(lowered)
    cached = with_cache_format(lowered, options.cache or _default_cache(options))
    if cached is lowered and options.cache not in (None, "float32"):
        raise PolicyError(
            f"cache: found {options.cache!r}, but {model.name} has no keys and values that an attention operator of "
            "Doubleweave's alone reads, so that they stay float32; leave it out"
        )
    lowered = joined(cached, {ENCODER: encoder}) if decoder and project else cached
    encode = torch.no_grad()(project or (lambda rows: ()))
    return Splits(torch_split, lowered, encode, border, "; ".join(calibration.used))


def _default_cache(options: Options) -> str:
    """What perplexity does not feel (benchmarks/cache_formats.py), where numbers are rounded anyway."""
    is_rounded = options.backend.name == DEFAULT_BACKEND and options.recipe != "none"
    return "bfloat16" if is_rounded else "float32"


def _save_tokenizer(save: Callable[[Path], None], folder: Path) -> None:
    try:
        save(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception with what the system said
        raise OSError(errno.EIO, f"{TOKENIZER_FILE}: {error}") from error
