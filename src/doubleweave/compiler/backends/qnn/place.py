"""From a float32 split to one that QNN can lower: lookups on the CPU, everything else quantized and measured."""

from __future__ import annotations

from dataclasses import replace

from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.backends.placing import fits, placed, with_segments
from doubleweave.compiler.backends.qnn import BLOCKS, NARROW
from doubleweave.compiler.backends.qnn.budget import within_budget
from doubleweave.compiler.backends.qnn.dynamic import ask_for_dynamic_shape
from doubleweave.compiler.backends.qnn.quantize import KEPT, quantize, recipes_of
from doubleweave.compiler.program_folder import Progress, counted
from doubleweave.compiler.quantize.calibration import Calibration
from doubleweave.compiler.quantize.quality import signal_to_noise
from doubleweave.compiler.quantize.weights import Rounding, on_grids
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import SizeRanges

CPU = "cpu"  # the recipe of a segment that stays on the CPU, in float32


def place(
    torch_split: TorchSplit, options: Options, calibration: Calibration, report: Progress
) -> TorchSplit:
    """Place and quantize the segments.

    On a phone the methods of a segment are graphs of one context and share its weights. The emulator cannot run that:
    with `emulate` each method has a context of its own. Raises PolicyError, LowerError or InputError.
    """
    own = options.own
    chunks = calibration.chunks(own["calibrate"])
    step = counted(report, len(torch_split.split.segments) + len(chunks) + 1)
    if own["attention_device"] == "npu":
        torch_split = _with_attention_on_npu(torch_split)
    names = [segment.name for segment in torch_split.split.segments if fits(segment)]
    recipes = recipes_of(names, options.recipe, own["keep"])
    on_npu = {name: recipe for name, recipe in recipes.items() if recipe != CPU}
    split = placed(torch_split, on_npu, options.backend.name, own["soc"], shares_context=not own["emulate"])
    for name in on_npu:
        if isinstance(split.split.segment(name).shape, SizeRanges):
            step(f"asking QNN for {name} with sizes that change")
            ask_for_dynamic_shape(split, name, on_npu[name], own["soc"], chunks[0].shape[1])
    quantized = quantize(split, on_npu, own["soc"], chunks, step, calibration.importance)
    step("comparing with float32")
    # Two chunks are enough to tell where the noise is; each runs every segment twice in eager torch.
    found = signal_to_noise(split, quantized, list(on_npu), chunks[:2])
    if own["budget"] is not None:
        wide = {name: KEPT for name, recipe in on_npu.items() if recipe in NARROW}
        others = with_segments(
            split, lambda segment: replace(segment, recipe=wide.get(segment.name, segment.recipe))
        )
        narrow = {name: found[name] for name in wide}
        quantized = within_budget(
            split,
            quantized,
            lambda: quantize(others, wide, own["soc"], chunks, step),
            narrow,
            chunks,
            own["budget"],
            step,
        )
        found |= signal_to_noise(split, quantized, list(wide), chunks[:2])
    return with_segments(quantized, lambda segment: replace(segment, snr_db=found.get(segment.name)))


def rounding(torch_split: TorchSplit, options: Options) -> Rounding | None:
    """Channels are scaled where weights are put in blocks of 4 bits, for the weights more than for activations, which
    have 16. A group that lies on a grid would lose more than they gain (docs/design.md)."""
    return Rounding(unscaled=on_grids(torch_split), exponent=0.25) if options.recipe == BLOCKS else None


def _with_attention_on_npu(torch_split: TorchSplit) -> TorchSplit:
    """The split with attention on the NPU: the segments of dynamic sizes, for the NPU's others have fixed sizes."""
    return with_segments(
        torch_split,
        lambda segment: replace(segment, device="npu") if isinstance(segment.shape, SizeRanges) else segment,
    )
