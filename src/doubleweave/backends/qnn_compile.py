"""From a float32 split to one that QNN can lower: lookups on the CPU, everything else quantized and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from doubleweave.backends import qnn, xnnpack
from doubleweave.backends.qnn_dynamic import ask_for_dynamic_shape
from doubleweave.backends.qnn_quantize import quantize, recipes_of
from doubleweave.ir import Dynamic, Segment, Static, most_rows, rows
from doubleweave.quality import signal_to_noise
from doubleweave.split import TorchSplit
from doubleweave.static_attention import MASK

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

    Lookups by token or position (int64 inputs) stay on the CPU: they compute next to nothing, and a table in an NPU's
    context is read from memory all the same. Raises PolicyError and LowerError.
    """
    names = [segment.name for segment in torch_split.split.segments if _fits(segment)]
    recipes = recipes_of(names, options.recipe, options.keep)
    on_npu = {name: recipe for name, recipe in recipes.items() if recipe != CPU}
    placed = _placed(torch_split, on_npu, options)
    for name in on_npu:
        if isinstance(placed.split.segment(name).shape, Dynamic):
            progress(f"asking QNN for {name} with sizes that change")
            ask_for_dynamic_shape(placed, name, on_npu[name], options.soc, chunks[0].shape[1])
    quantized = quantize(placed, on_npu, options.soc, chunks, progress)
    progress("comparing with float32")
    found = signal_to_noise(placed, quantized, list(on_npu), chunks[:2])
    segments = [
        replace(segment, snr_db=found[segment.name]) if segment.name in found else segment
        for segment in quantized.split.segments
    ]
    return replace(quantized, split=replace(quantized.split, segments=tuple(segments)))


def _fits(segment: Segment) -> bool:
    """Whether it is meant for the NPU and can go there: float32 in and out."""
    ports = (*segment.inputs, *segment.outputs)
    return segment.device == "npu" and all(port.dtype == "float32" for port in ports)


def _placed(torch_split: TorchSplit, recipes: Mapping[str, str], options: QnnOptions) -> TorchSplit:
    segments = []
    for segment in torch_split.split.segments:
        if segment.name in recipes:
            segment = replace(
                segment,
                backend=qnn.NAME,
                target=options.soc,
                recipe=recipes[segment.name],
                contexts=len(segment.methods()) if options.emulate else 1,
            )
        elif isinstance(segment.shape, Static):
            # A mask has to hide the rows of padding too, so it is worked out for all of the NPU's rows; inlined
            # attention takes fixed sizes wherever it runs.
            is_fixed = segment.name == MASK or segment.attended_width > 0
            shape = segment.shape if is_fixed else rows(1, most_rows(segment.shape))
            segment = replace(segment, device="cpu", backend=xnnpack.NAME, shape=shape)
        segments.append(segment)
    return replace(torch_split, split=replace(torch_split.split, segments=tuple(segments)))
