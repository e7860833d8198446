"""Ask QNN for a segment of dynamic shape, by itself and before the long work."""

from __future__ import annotations

import torch

from doubleweave.compiler.backends.export_segment import export_segment
from doubleweave.compiler.backends.qnn import lower as qnn
from doubleweave.compiler.backends.qnn.quantize import converted, observed
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.transform import transform_segments
from doubleweave.errors import LowerError
from doubleweave.ir.sizes import shape_of
from doubleweave.ir.split import CACHED, ROWS


def ask_for_dynamic_shape(torch_split: TorchSplit, name: str, recipe: str, soc: str, rows: int) -> None:
    """Compile one segment with scales of made-up inputs of `rows` rows; LowerError with QNN's reason if it refuses."""
    prepared = transform_segments(torch_split, qnn.prepare, frozenset({name}))
    segment = prepared.split.segment(name)
    module = observed(prepared, segment, recipe, soc, rows)
    sizes = {ROWS: rows, CACHED: 2 * rows}
    with torch.no_grad():
        module(*(torch.rand(shape_of(port.shape, sizes)) for port in segment.inputs))
    exported = export_segment(converted(name, module), segment, None)
    try:
        qnn.to_edge({name: exported}, soc)
    except LowerError as error:
        raise LowerError(
            f"segment {name}, with sizes that change from call to call: {error}; leave it on the CPU "
            "(--attention-device cpu), or compile it for fixed sizes (--attention static --max-context N)"
        ) from error
