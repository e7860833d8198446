"""Lower segments to XNNPACK's delegates.

Rewrites the operators that XNNPACK's partitioner leaves outside its delegate, and partitions by levels of the graph. It
knows nothing of models or schedules.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.backends.lowered import Lowered
from doubleweave.compiler.backends.xnnpack.packed_linears import with_packed_linears
from doubleweave.compiler.backends.xnnpack.taken import configs
from doubleweave.compiler.graph.nodes import insert, is_call, is_tensor, replace_nodes
from doubleweave.compiler.program_folder import Progress
from doubleweave.compiler.quantize.calibration import Calibration
from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.kept import kept_formats
from doubleweave.compiler.quantize.weights import Rounding, quantize
from doubleweave.compiler.quantize.weights import rounding as rounding_of
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.transform import copy_graph, over_empty_weights
from doubleweave.compiler.split.weights import Convert, Weights

aten = torch.ops.aten


def prepare(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, Convert]:
    """Rewrite a structure for XNNPACK; returns the graph and what it does to a segment's weights.

    RMSNorm's mean over the last dim is not delegated and would cut the segment in two; as a linear onto
    one feature with the weights 1/n it is.
    """
    packed, pack = with_packed_linears(graph_module)
    graph = copy_graph(packed)
    num_weights = len({node.target for node in graph.find_nodes(op="get_attr")})
    added: list[int] = []  # widths; equal ones share a vector

    def mean(node: Any) -> Any:
        if not is_call(node, aten.mean.dim) or _dtypes(node) != {torch.float32}:
            return None
        # The last dim is kept as 1.
        if list(node.args[1]) != [-1] or len(node.args) < 3 or not node.args[2]:
            return None
        width = int(node.args[0].meta["val"].shape[-1])
        if width not in added:
            added.append(width)
        ones = graph.get_attr(f"w{num_weights + added.index(width)}")
        ones.meta["val"] = node.meta["val"].new_empty(1, width)
        return insert(graph, aten.linear.default, node.args[0], ones, like=node)

    replace_nodes(graph, mean)
    for rewrite in (_addmm, _sigmoid, _rsqrt, _tanh_gelu):
        replace_nodes(graph, partial(rewrite, graph))

    def convert(weights: Weights) -> Weights:
        return (*pack(weights), *(torch.full((1, width), 1.0 / width) for width in added))

    return over_empty_weights(graph), convert


def _dtypes(node: Any) -> set[torch.dtype]:
    """The dtypes of a node's result and of what it is computed from."""
    return {found.meta["val"].dtype for found in (node, *node.all_input_nodes) if is_tensor(found)}


def _tanh_gelu(graph: fx.Graph, node: Any) -> Any:
    """GELU by tanh, in operators that a delegate takes: XNNPACK has one GELU, the exact one, and takes any for it.

    0.5 * (1 + tanh(y)) is sigmoid(2 * y).
    """
    if not is_call(node, aten.gelu.default) or node.kwargs.get("approximate", "none") == "none":
        return None
    x = node.args[0]
    # x * (a + b * x * x): half precision holds fewer numbers in x * x * x.
    square = insert(graph, aten.mul.Tensor, x, x, like=node)
    scaled = insert(graph, aten.mul.Tensor, square, 2 * math.sqrt(2 / math.pi) * 0.044715, like=node)
    factor = insert(graph, aten.add.Tensor, scaled, 2 * math.sqrt(2 / math.pi), like=node)
    gate = _bounded_sigmoid(graph, insert(graph, aten.mul.Tensor, x, factor, like=node), node)
    return insert(graph, aten.mul.Tensor, x, gate, like=node)


def _sigmoid(graph: fx.Graph, node: Any) -> Any:
    """Sigmoid of what may be a mask's -3e38: beyond 2e27 XNNPACK's is NaN."""
    is_float = is_call(node, aten.sigmoid.default) and _dtypes(node) == {torch.float32}
    return _bounded_sigmoid(graph, node.args[0], node) if is_float else None


def _bounded_sigmoid(graph: fx.Graph, x: Any, like: Any) -> Any:
    bounded = insert(graph, aten.clamp.default, x, -88.0, 88.0, like=like)
    return insert(graph, aten.sigmoid.default, bounded, like=like)


def _rsqrt(graph: fx.Graph, node: Any) -> Any:
    """A power of what may be 0, where XNNPACK's rsqrt is NaN in place of infinity. A norm adds a number before it."""
    if not is_call(node, aten.rsqrt.default) or _dtypes(node) != {torch.float32}:
        return None
    source = node.args[0]
    if is_call(source, aten.add.Tensor) and isinstance(source.args[1], float) and source.args[1] > 0:
        return None
    return insert(graph, aten.pow.Tensor_Scalar, source, -0.5, like=node)


def _addmm(graph: fx.Graph, node: Any) -> Any:
    """Factors, and a bias that is no row: XNNPACK takes addmm for a linear without factors."""
    if not is_call(node, aten.addmm.default):
        return None
    bias, a, b = node.args
    alpha, beta = (node.kwargs.get(name, 1) for name in ("alpha", "beta"))
    if (alpha, beta) == (1, 1) and tuple(bias.meta["val"].shape) == (b.meta["val"].shape[1],):
        return None
    product = insert(graph, aten.mm.default, a, b, like=node)
    if alpha != 1:
        product = insert(graph, aten.mul.Tensor, product, alpha, like=node)
    if beta == 0:  # NaN in the bias does not count
        return product
    if beta != 1:
        bias = insert(graph, aten.mul.Tensor, bias, beta, like=node)
    return insert(graph, aten.add.Tensor, product, bias, like=node)


def place(
    torch_split: TorchSplit, options: Options, calibration: Calibration, report: Progress
) -> TorchSplit:
    """Quantize the weights; the split puts every segment here by itself."""
    return quantize(torch_split, options.recipe, _asked(torch_split, options))


def rounding(torch_split: TorchSplit, options: Options) -> Rounding | None:
    return rounding_of(torch_split, options.recipe, _asked(torch_split, options))


def _asked(torch_split: TorchSplit, options: Options) -> dict[Place, str]:
    keep = options.own.get("keep", {})
    return kept_formats(torch_split, keep, is_part=options.is_part) if keep else {}


def to_edge(exported: dict[str, torch.export.ExportedProgram], target: str, recipe: str) -> Lowered:
    """Lower to XNNPACK's delegates. There is one target, any CPU; the graphs say how they are quantized."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    config = EdgeCompileConfig(_check_ir_validity=False)
    return Lowered(to_edge_transform_and_lower(exported, partitioner=[_partitioner()], compile_config=config))


def _partitioner() -> object:
    """XNNPACK's partitioner, changed to make the fewest delegates.

    XnnpackPartitioner alone cuts a quantized block in two (and with the dynamically quantized one listed
    first, as is usual, gives each linear a delegate of its own); what passes between delegates costs memory
    and time. Here all that XNNPACK takes at one level is one delegate.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from torch.fx.passes.infra.partitioner import Partition

    class LevelPartitioner(XnnpackPartitioner):  # type: ignore[misc]
        def ops_to_not_decompose(self, ep: Any) -> tuple[list[Any], Any]:
            """Operators that stay whole, and None where that follows from the operator alone.

            With a check of each node ExecuTorch decomposes three times instead of once, half the time of lowering.
            """
            operators, check = super().ops_to_not_decompose(ep)
            taken: defaultdict[Any, set[bool]] = defaultdict(set)
            for node in ep.graph.nodes:
                if node.op == "call_function" and node.target in operators:
                    taken[node.target].add(check(node))
            if any(len(answers) > 1 for answers in taken.values()):
                return operators, check
            return [operator for operator, answers in taken.items() if answers == {True}], None

        def generate_partitions(self, ep: Any) -> list[Any]:
            groups = self.get_matched_nodes_from_configs(ep)
            levels = _levels(ep.graph_module.graph, groups)
            if levels is None:  # a delegate of a whole level would read its own results
                found: list[Any] = super().generate_partitions(ep)
                return found
            by_level: defaultdict[int, list[Any]] = defaultdict(list)
            for group, level in zip(groups, levels, strict=True):
                by_level[level] += group
            return [Partition(id=level, nodes=nodes) for level, nodes in sorted(by_level.items())]

    return LevelPartitioner(configs())


def _levels(graph: fx.Graph, groups: list[list[Any]]) -> list[int] | None:
    """The level of each group: how many nodes outside all groups lie on the way to it, at most.

    Groups of one level can be one delegate without a cycle. None when the groups themselves form one.
    """
    group_of = {node: number for number, group in enumerate(groups) for node in group}
    units = [*groups, *([node] for node in graph.nodes if node not in group_of)]
    unit_of = {node: number for number, unit in enumerate(units) for node in unit}
    inputs = [
        {unit_of[source] for node in unit for source in node.all_input_nodes} - {number}
        for number, unit in enumerate(units)
    ]
    try:
        order = list(TopologicalSorter(dict(enumerate(inputs))).static_order())
    except CycleError:
        return None
    levels = [0] * len(units)
    for unit in order:
        outside = unit >= len(groups)
        computed = [u for u in inputs[unit] if any(node.op == "call_function" for node in units[u])]
        levels[unit] = max((levels[u] + (u >= len(groups) and not outside) for u in computed), default=0)
    return levels[: len(groups)]
