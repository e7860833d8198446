"""From a language model to its split, quantized: what compile lowers, and what runs in eager torch as reference."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.compiler.program_folder import Progress
from doubleweave.ir.manifest import TOKENIZER_FILE
from doubleweave.ir.split import FixedSizes, SizeRanges, most_rows

if TYPE_CHECKING:
    from doubleweave.compiler.backends.qnn.compile import QnnOptions
    from doubleweave.compiler.split.pieces import TorchSplit
    from doubleweave.sources.model import Model

# What static attention adds to the scores of keys that a query does not see. Quantized, it takes part in the scores'
# scale: the value of ExecuTorch's Qualcomm examples leaves such keys no weight, and the scores enough steps.
_HIDDEN, _HIDDEN_QUANTIZED = -1e9, -255.0


@dataclass(frozen=True)
class Options:
    """How a language model is compiled; compile_llm says what the words mean. `to_qnn` is for QNN, `openvino` the
    device for OpenVINO; neither: for XNNPACK."""

    recipe: str
    sizes: FixedSizes | SizeRanges
    max_context: int
    attention: str = "dynamic"
    attention_device: str = "cpu"
    to_qnn: QnnOptions | None = None
    openvino: str | None = None


def quantized_llm(model: Model, options: Options, folder: Path, report: Progress) -> TorchSplit:
    """Export, split and quantize; writes the tokenizer into `folder`. Raises SplitError, PolicyError, LowerError or,
    for a calibration text, InputError."""
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.graph.static_attention import MASK, inline_attention
    from doubleweave.compiler.quantize.weights import quantize
    from doubleweave.compiler.split.split_llm import default_policy, split_llm

    report("exporting the graph", 0, 1)
    most = most_rows(options.sizes)
    graph = export_llm(model.module, most)
    owners = owned_modules(model.module)
    if options.attention == "static":
        hidden = _HIDDEN if options.to_qnn is None else _HIDDEN_QUANTIZED
        inline_attention(graph, options.max_context, hidden)
        owners |= {MASK: MASK}
    torch_split = split_llm(
        graph,
        owners,
        default_policy(options.sizes, options.attention_device),
        last_row=frozenset({"lm_head"}),
        max_context=options.max_context,
        backend="xnnpack",
    )
    report(f"quantizing ({options.recipe})", 0, 1)
    if model.save_tokenizer is not None:
        _save_tokenizer(model.save_tokenizer, folder)
    if options.openvino is not None:
        from doubleweave.compiler.backends.openvino import to_openvino

        return to_openvino(torch_split, options.openvino, options.recipe)
    if options.to_qnn is None:
        return quantize(torch_split, options.recipe)
    return _quantize_for_qnn(torch_split, options.to_qnn, folder, model.vocab_size, most, report)


def _quantize_for_qnn(
    torch_split: TorchSplit, options: QnnOptions, folder: Path, vocab_size: int, size: int, report: Progress
) -> TorchSplit:
    from doubleweave.compiler.backends.qnn.compile import to_qnn
    from doubleweave.compiler.quantize.calibration import calibration_chunks

    chunks = calibration_chunks(options.calibrate, folder / TOKENIZER_FILE, size, vocab_size)
    total = len(torch_split.split.segments) + len(chunks) + 1
    done = 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        report(what, min(done, total), total)

    return to_qnn(torch_split, options, chunks, step)


def _save_tokenizer(save: Callable[[Path], None], folder: Path) -> None:
    try:
        save(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception with what the system said
        raise OSError(errno.EIO, f"{TOKENIZER_FILE}: {error}") from error
