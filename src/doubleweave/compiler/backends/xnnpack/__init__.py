"""XNNPACK: the default on every CPU, and the stand-in for an NPU where there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doubleweave.compiler.backends.backend import Backend, CalibrationChunks, Options
from doubleweave.compiler.program_folder import Progress

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from doubleweave.compiler.backends.lowered import Lowered
    from doubleweave.compiler.split.pieces import TorchSplit
    from doubleweave.compiler.split.transform import Convert


def _to_edge(exported: dict[str, ExportedProgram], target: str, recipe: str) -> Lowered:
    from doubleweave.compiler.backends.xnnpack.lower import to_edge

    return to_edge(exported)


def _prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    from doubleweave.compiler.backends.xnnpack.lower import prepare

    return prepare(graph_module)


def _place(
    torch_split: TorchSplit, options: Options, chunks: CalibrationChunks, report: Progress
) -> TorchSplit:
    """The split puts everything here by itself."""
    from doubleweave.compiler.quantize.weights import quantize

    return quantize(torch_split, options.recipe)


BACKEND = Backend(
    "xnnpack",
    _to_edge,
    _prepare,
    about="any CPU",
    recipes={"8da8w": "8-bit weights", "8da4w": "4-bit weights in groups of 32", "none": "float32"},
    place=_place,
)
