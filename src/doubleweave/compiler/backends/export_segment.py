"""Export one segment at the sizes that it is lowered at."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph.export import export
from doubleweave.errors import LowerError
from doubleweave.ir.sizes import evaluate, shape_of, symbols
from doubleweave.ir.split import ROWS, Segment, SizeRanges

# Sizes to export with: torch takes a 1 for a constant, and equal ones might look like one dim.
_EXAMPLES = (33, 65, 47, 29, 23, 19, 17, 13, 11, 7, 5, 3, 2)


def export_segment(
    module: fx.GraphModule, segment: Segment, size: int | None
) -> torch.export.ExportedProgram:
    """Export a segment's module at one size or (None) for its range of sizes.

    Raises LowerError where a size that should stay dynamic would be fixed.
    """
    shape = segment.shape
    values: dict[str, int] = {} if size is None else {ROWS: size}
    dims: dict[str, Any] = {}
    for symbol, low, high in shape.ranges if isinstance(shape, SizeRanges) else ():
        least = low if isinstance(low, int) else 1
        dims[symbol] = torch.export.Dim(symbol, min=least, max=max(2, high))
        free = (n for n in _EXAMPLES if least <= n <= high and n not in values.values())
        values[symbol] = next(free, max(2, high))
    args, dynamic = [], []
    for port in segment.inputs:
        args.append(torch.zeros(shape_of(port.shape, values), dtype=getattr(torch, port.dtype)))
        axes = {axis: found for axis, found in enumerate(port.shape) if isinstance(found, str)}
        dynamic.append({axis: _dim(found, dims) for axis, found in axes.items() if dims})
    with torch.no_grad():
        exported = export(module, args, tuple(dynamic))
    _check_dynamic(exported, segment, dynamic)
    return exported


def _dim(size: str, dims: Mapping[str, Any]) -> Any:
    """The dim of a size: a symbol's, one derived from it (2*k + 1), or what torch.export works out by itself."""
    names = symbols(size)
    if len(names) == 1:
        (name,) = names
        at = [evaluate(size, {name: number}) for number in (1, 2, 3, 4)]
        step = at[1] - at[0]
        # Four points on a line: torch.export takes multiples of a Dim plus a number, nothing else.
        if step > 0 and [b - a for a, b in pairwise(at)] == [step] * 3:
            dim = dims[name] if step == 1 else step * dims[name]
            offset = at[0] - step
            return dim if not offset else dim + offset
    return torch.export.Dim.AUTO


def _check_dynamic(
    exported: torch.export.ExportedProgram, segment: Segment, dynamic: list[dict[int, Any]]
) -> None:
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = placeholders[len(placeholders) - len(dynamic) :]  # those before are weights
    for node, port, axes in zip(inputs, segment.inputs, dynamic, strict=True):
        for axis in axes:
            if isinstance(node.meta["val"].shape[axis], int):
                raise LowerError(
                    f"segment {segment.name}: axis {axis} of {port.name} ({port.shape[axis]}) would be fixed at "
                    f"{node.meta['val'].shape[axis]}; make it Static, or give its module other dims"
                )
