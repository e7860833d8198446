"""From a float32 split to one that QNN can lower: lookups on the CPU, everything else quantized and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from doubleweave.compiler.backends.placing import fits, placed
from doubleweave.compiler.backends.qnn import lower as qnn
from doubleweave.compiler.backends.qnn.dynamic import ask_for_dynamic_shape
from doubleweave.compiler.backends.qnn.quantize import quantize, recipes_of
from doubleweave.compiler.quantize.quality import signal_to_noise
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import SizeRanges

CPU = "cpu"  # the recipe of a segment that stays on the CPU, in float32


@dataclass(frozen=True)
class QnnOptions:
    """What compiling for QNN takes besides the model: the SoC, the recipe, other recipes by pattern of segment names
    ("cpu" keeps a segment on the CPU), and the text to calibrate on (None: the one in the package).

    On a phone the methods of a segment are graphs of one context and share its weights. The emulator cannot run that:
    with `emulate` each method has a context of its own.
    """

    soc: str
    recipe: str = "16a8w"
    keep: Mapping[str, str] = field(default_factory=dict)
    calibrate: str | Path | None = None
    emulate: bool = False


def to_qnn(
    torch_split: TorchSplit, options: QnnOptions, chunks: Sequence[Tensor], progress: Callable[[str], None]
) -> TorchSplit:
    """Place and quantize the segments. `chunks` are token ids int64 [1, T] of one text, all of one size.

    Raises PolicyError and LowerError.
    """
    names = [segment.name for segment in torch_split.split.segments if fits(segment)]
    recipes = recipes_of(names, options.recipe, options.keep)
    on_npu = {name: recipe for name, recipe in recipes.items() if recipe != CPU}
    split = placed(torch_split, on_npu, qnn.NAME, options.soc, shares_context=not options.emulate)
    for name in on_npu:
        if isinstance(split.split.segment(name).shape, SizeRanges):
            progress(f"asking QNN for {name} with sizes that change")
            ask_for_dynamic_shape(split, name, on_npu[name], options.soc, chunks[0].shape[1])
    quantized = quantize(split, on_npu, options.soc, chunks, progress)
    progress("comparing with float32")
    found = signal_to_noise(split, quantized, list(on_npu), chunks[:2])
    segments = [
        replace(segment, snr_db=found[segment.name]) if segment.name in found else segment
        for segment in quantized.split.segments
    ]
    return replace(quantized, split=replace(quantized.split, segments=tuple(segments)))
