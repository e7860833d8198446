"""OpenVINO: Intel's NPUs and GPUs, and CPUs. Fixed sizes, in float32 or with 8-bit weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from doubleweave.compiler.backends.backend import Backend, CalibrationChunks, Option, Options
from doubleweave.compiler.program_folder import Progress
from doubleweave.vendors.openvino import DEVICES, check_device, check_nncf

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from doubleweave.compiler.backends.lowered import Lowered
    from doubleweave.compiler.split.pieces import TorchSplit
    from doubleweave.compiler.split.transform import Convert


def _to_edge(exported: dict[str, ExportedProgram], target: str, recipe: str) -> Lowered:
    from doubleweave.compiler.backends.openvino.lower import to_edge

    return to_edge(exported, target, recipe)


def _prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    from doubleweave.compiler.backends.plain_rotary import without_rotary

    return without_rotary(graph_module)


def _check(recipe: str, attention: str, own: Mapping[str, Any]) -> Mapping[str, Any]:
    device = own["device"] or "CPU"
    check_device(device)
    if recipe != "none":
        check_nncf()
    return {"device": device}


def _place(
    torch_split: TorchSplit, options: Options, chunks: CalibrationChunks, report: Progress
) -> TorchSplit:
    from doubleweave.compiler.backends.placing import fits, placed

    recipes = {segment.name: options.recipe for segment in torch_split.split.segments if fits(segment)}
    return placed(torch_split, recipes, BACKEND.name, options.own["device"], shares_context=False)


BACKEND = Backend(
    "openvino",
    _to_edge,
    _prepare,
    way_out="compile it for XNNPACK: --backend xnnpack --shape static",
    about="Intel's chips",
    recipes={"8w": "8-bit weights", "none": ""},
    options=(Option("device", "CPU (default), GPU or NPU", metavar="DEVICE", choices=DEVICES),),
    takes_fixed_sizes_only=True,
    check=_check,
    place=_place,
)
