"""The OpenVINO backend: Intel's NPUs and GPUs, and CPUs. Fixed sizes, in float32 or with 8-bit weights.

A segment becomes one delegate, compiled for one device; NNCF compresses its weights. It knows nothing of models or
schedules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from doubleweave.compiler.backends.lowered import Lowered, left_over
from doubleweave.compiler.backends.placing import fits, placed
from doubleweave.compiler.backends.plain_rotary import replace_rotary
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.transform import Convert, copy_graph, over_empty_weights, transform_segments
from doubleweave.errors import LowerError
from doubleweave.vendors.openvino_sdk import load_openvino
from doubleweave.vendors.printed_output import captured

NAME = "openvino"


def to_openvino(torch_split: TorchSplit, device: str, recipe: str) -> TorchSplit:
    """Place the segments that OpenVINO can take on one of its devices ("CPU", "GPU" or "NPU"). recipe: "8w", int8
    weights with one scale an output feature, or "none"."""
    recipes = {segment.name: recipe for segment in torch_split.split.segments if fits(segment)}
    split = placed(torch_split, recipes, NAME, device, shares_context=False)
    return transform_segments(split, _prepare, frozenset(recipes))


def _prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    graph = copy_graph(graph_module)
    replace_rotary(graph)
    return over_empty_weights(graph), lambda weights: weights


def to_edge(exported: dict[str, torch.export.ExportedProgram], target: str, recipe: str = "none") -> Lowered:
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
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    names = set(program.graph_signature.user_inputs)
    examples = [node.meta["val"] for node in inputs if node.name in names]
    args = tuple(torch.zeros(value.shape, dtype=value.dtype) for value in examples)
    with torch.no_grad():
        return torch.export.export(module, args, strict=False)


def _to_edge(exported: dict[str, torch.export.ExportedProgram], device: str) -> Any:
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return to_edge_transform_and_lower(
        exported,
        partitioner=[OpenvinoPartitioner([CompileSpec("device", device.encode())])],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
