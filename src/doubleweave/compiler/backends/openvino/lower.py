"""Lower segments to OpenVINO's delegates.

A segment becomes one delegate, compiled for one device; NNCF compresses its weights. It knows nothing of models or
schedules.
"""

from __future__ import annotations

from typing import Any

import torch

from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.backends.lowered import Lowered, left_over
from doubleweave.compiler.backends.placing import fits, placed
from doubleweave.compiler.program_folder import Progress
from doubleweave.compiler.quantize.calibration import Calibration
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.errors import LowerError
from doubleweave.vendors.openvino import load_openvino
from doubleweave.vendors.printed_output import captured


def place(
    torch_split: TorchSplit, options: Options, calibration: Calibration, report: Progress
) -> TorchSplit:
    """Place the segments that OpenVINO can take on one of its devices."""
    recipes = {segment.name: options.recipe for segment in torch_split.split.segments if fits(segment)}
    return placed(torch_split, recipes, options.backend.name, options.own["device"], shares_context=False)


def to_edge(exported: dict[str, torch.export.ExportedProgram], target: str, recipe: str) -> Lowered:
    """Lower exported segments, by method, to one OpenVINO delegate each, for a device, the target.

    Raises LowerError for what OpenVINO does not take.
    """
    load_openvino()
    # The partitioner prints every operator that it does not know, and NNCF says what it does.
    edge, _ = captured(
        lambda: _to_edge({name: _compressed(program, recipe) for name, program in exported.items()}, target)
    )
    for name in exported:
        if left := left_over(edge.exported_program(name)):
            raise LowerError(f"OpenVINO does not take {', '.join(left)}")
    return Lowered(edge)


def _compressed(program: torch.export.ExportedProgram, recipe: str) -> torch.export.ExportedProgram:
    if recipe == "none":
        return program
    from executorch.backends.openvino.quantizer import OpenVINOQuantizer
    from executorch.backends.openvino.quantizer.quantizer import QuantizationMode
    from nncf.experimental.torch.fx import compress_pt2e

    quantizer = OpenVINOQuantizer(mode=QuantizationMode.INT8WO_SYM)
    module: Any = compress_pt2e(program.module(), quantizer=quantizer)
    with torch.no_grad():
        return torch.export.export(module, program.example_inputs[0], strict=False)


def _to_edge(exported: dict[str, torch.export.ExportedProgram], device: str) -> Any:
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return to_edge_transform_and_lower(
        exported,
        partitioner=[OpenvinoPartitioner([CompileSpec("device", device.encode())])],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
