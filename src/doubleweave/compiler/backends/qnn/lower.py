"""Lower segments to Qualcomm's HTP, the NPU of Snapdragons. Fixed sizes, quantized; on x86 an emulator runs them.

Rewrites RMSNorm and rotary embedding into operators that QNN takes, and lowers a quantized segment to one context
binary through ExecuTorch's partitioner. It knows nothing of models, calibration or schedules.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.backends.lowered import Lowered, left_over
from doubleweave.compiler.backends.plain_rotary import replace_rotary
from doubleweave.compiler.graph.nodes import insert, is_call, replace_nodes
from doubleweave.compiler.graph.norms import match_rms_norm
from doubleweave.compiler.split.transform import copy_graph, over_empty_weights
from doubleweave.compiler.split.weights import Convert
from doubleweave.errors import LowerError
from doubleweave.vendors.printed_output import captured
from doubleweave.vendors.qnn_messages import refusal, traffic
from doubleweave.vendors.qnn_sdk import load_sdk

aten = torch.ops.aten
_DEQUANTIZE_BLOCKS = "torchao.dequantize_affine.default"


def prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """Rewrite a structure for QNN: RMSNorm as one operator, rotary embedding in operators that QNN has.

    Sizes of rows are left to be worked out (-1), so that the graph serves every size.
    """
    graph = copy_graph(graph_module)
    replace_rotary(graph)

    def fused(node: Any) -> Any:
        if not is_call(node, aten.mul.Tensor) or (found := match_rms_norm(node)) is None:
            return None
        x, weight, eps = found
        return insert(graph, aten.rms_norm.default, x, list(weight.meta["val"].shape), weight, eps, like=node)

    replace_nodes(graph, fused)
    replace_nodes(graph, partial(_without_copies, graph))
    replace_nodes(graph, partial(_with_open_rows, graph))
    return over_empty_weights(graph), lambda weights: weights


def _without_copies(graph: fx.Graph, node: Any) -> Any:
    """A copy's input, and a reshape in the place of a view that needs one.

    QNN's quantizer has no rule for copies: it gives them scales of their own. A copy of one row has nothing to do, so
    the compiler leaves it out, with the change of scales.
    """
    if is_call(node, aten.clone.default, aten.contiguous.default):
        return node.args[0]
    if is_call(node, aten.view.default, aten._unsafe_view.default):
        return insert(graph, aten.reshape.default, *node.args, like=node)
    return None


def _with_open_rows(graph: fx.Graph, node: Any) -> Any:
    """A view that names its number of rows, as heads do that are told apart for a norm of their own."""
    if not is_call(node, aten.reshape.default):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
    if sizes.count(-1) != 1 or sizes == list(node.args[1]):
        return None
    return insert(graph, node.target, node.args[0], sizes, like=node)


def to_edge(exported: dict[str, torch.export.ExportedProgram], target: str, recipe: str = "") -> Lowered:
    """Lower quantized, exported segments, by method, to one QNN delegate each, for a SoC, the target.

    Several methods are graphs of one context and share their weights. It takes the steps of ExecuTorch's
    to_edge_transform_and_lower_to_qnn, for programs that are exported already. Raises LowerError with QNN's reason.
    """
    load_sdk()
    try:
        edge, printed = captured(lambda: _to_edge(exported, target))
    except Exception as error:
        reason = refusal(getattr(error, "printed", "")) or (str(error).strip() or repr(error)).splitlines()[0]
        raise LowerError(f"QNN refuses it ({reason})") from error
    for name in exported:
        if left := left_over(edge.exported_program(name)):
            reason = refusal(printed)
            raise LowerError(f"QNN does not take {', '.join(left)}{f' ({reason})' if reason else ''}")
        for module in edge.exported_program(name).graph_module.children():
            _check_graphs(module, list(exported))
    reported = traffic(printed)
    return Lowered(edge, dict(zip(exported, reported, strict=True)) if len(reported) == len(exported) else {})


def _to_edge(exported: dict[str, torch.export.ExportedProgram], target: str) -> Any:
    from executorch.backends.qualcomm._passes.qnn_pass_manager import get_qnn_pass_manager_cls
    from executorch.backends.qualcomm.partition.qnn_partitioner import QnnPartitioner
    from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchBackendType
    from executorch.backends.qualcomm.utils.qnn_manager_lifecycle import QnnManagerContext
    from executorch.backends.qualcomm.utils.utils import qnn_edge_config
    from executorch.exir import to_edge_transform_and_lower

    specs = compile_specs(target, share_weights=len(exported) > 1)
    asked = _with_report(specs)
    programs, transforms = {}, {}
    for name, program in exported.items():
        passes = get_qnn_pass_manager_cls(QnnExecuTorchBackendType.kHtpBackend)()
        programs[name] = passes.transform_for_export_pipeline(program)
        # The compiler fails over blocks in a linear (q::GenPad, error 1002), not in a convolution of one pixel.
        has_blocks = any(str(node.target) == _DEQUANTIZE_BLOCKS for node in program.graph.nodes)
        transforms[name] = passes.get_to_edge_transform_passes(
            program, compiler_specs=asked, convert_linear_to_conv2d=has_blocks
        )
    with QnnManagerContext(dict.fromkeys(exported, asked)):
        edge = to_edge_transform_and_lower(
            programs,
            transform_passes=transforms,
            partitioner={name: [QnnPartitioner(asked)] for name in exported},
            compile_config=qnn_edge_config(),
        )
    for name in exported:
        for module in edge.exported_program(name).graph_module.children():
            module._compile_specs = specs  # the run time reads these; without the report it prints nothing
    return edge


def _check_graphs(module: Any, methods: list[str]) -> None:
    """Read a compiled context back: it must hold the graph of every method. LowerError if it does not."""
    found, _ = captured(lambda: graphs_of(module.compile_specs[0].value, module.processed_bytes))
    if sorted(found) != sorted(methods):
        raise LowerError(
            f"the compiled context holds the graphs {', '.join(found) or 'none'}, expected {methods}"
        )


def graphs_of(compile_spec: bytes, context: bytes) -> list[str]:
    """The names of the graphs in a context binary; LowerError where it cannot be read."""
    from executorch.backends.qualcomm.python.PyQnnManagerAdaptor import QnnManager

    manager = QnnManager(bytes(compile_spec), bytes(context))
    if manager.InitBackend().value or manager.InitContextCache().value:
        raise LowerError("a context that QNN has compiled cannot be read back")
    names: list[str] = manager.GetGraphNames()
    manager.Destroy()
    return names


def _with_report(specs: list[Any]) -> list[Any]:
    """The specs with the log level at which the compiler prints its report on memory (from SDK 2.51 on)."""
    from executorch.backends.qualcomm.serialization import qc_schema_serialize as serialize
    from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchLogLevel
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    asked = []
    for spec in specs:
        option = serialize.flatbuffer_to_option(spec.value)
        option.log_level = QnnExecuTorchLogLevel.kLogLevelInfo
        asked.append(CompileSpec(spec.key, serialize.option_to_flatbuffer(option)))
    return asked


def compile_specs(soc: str, *, share_weights: bool) -> list[Any]:
    """The compile specs of ExecuTorch's partitioner: the SoC, and whether graphs of one context share weights."""
    from executorch.backends.qualcomm.utils import utils

    htp = utils.generate_htp_compiler_spec(use_fp16=False, use_weight_sharing=share_weights)
    soc_model = utils.get_soc_to_chipset_map()[soc]
    specs: list[Any] = utils.generate_qnn_executorch_compiler_spec(soc_model=soc_model, backend_options=htp)
    return specs
