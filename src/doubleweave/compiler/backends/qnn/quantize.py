"""Quantize segments as QNN takes it: fixed scales, found on real inputs, by ExecuTorch's own quantizer.

Every segment gets observers; the split runs in eager torch over a text with them in it, so each segment sees its
true inputs; then the observers become quantize and dequantize operators. The result runs in eager torch as well: the
numeric reference of a QNN program.

The recipes are named by bits: 16a8w is 16-bit activations and 8-bit weights, one scale an output feature. In
16a4w_block linears have blocks of 4 bits with a scale and an offset each (blocks.py); the head keeps 8 bits, as on the
CPU.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.backends.export_segment import export_segment
from doubleweave.compiler.backends.qnn import BACKEND, BLOCKS
from doubleweave.compiler.backends.qnn import lower as qnn
from doubleweave.compiler.backends.qnn.blocks import with_blocks
from doubleweave.compiler.graph.nodes import constant
from doubleweave.compiler.graph.ops import REFERENCES
from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.quantize.weights import KEEP_8_BIT
from doubleweave.compiler.quiet import quiet
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit, derived_structure, with_weights
from doubleweave.compiler.split.transform import copy_graph, number_weights, transform_segments
from doubleweave.errors import LowerError, PolicyError
from doubleweave.ir.split import Segment, SizeRanges

aten = torch.ops.aten

RECIPES = tuple(BACKEND.recipes)
KEPT = "16a8w"  # what the head and the linears of sums and offsets get beside it


def recipes_of(names: Sequence[str], recipe: str, keep: Mapping[str, str]) -> dict[str, str]:
    """The recipe of each segment: that of the last pattern of `keep` that it matches, else `recipe`.

    `keep` may also say "cpu". Raises PolicyError for a recipe in `keep` that does not exist, and for a pattern that no
    segment matches.
    """
    if unknown := sorted(set(keep.values()) - {*RECIPES, "cpu"}):
        raise PolicyError(f"keep: found {unknown[0]!r}, expected one of {', '.join(RECIPES)}, cpu")
    chosen = {name: KEPT if recipe == BLOCKS and name in KEEP_8_BIT else recipe for name in names}
    for pattern, other in keep.items():
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise PolicyError(
                f"keep: {pattern!r} matches no segment; expected {names[0]} to {names[-1]} or a pattern (block_*)"
            )
        chosen.update(dict.fromkeys(matching, other))
    return chosen


def quantize(
    torch_split: TorchSplit,
    recipes: Mapping[str, str],
    soc: str,
    chunks: Sequence[Tensor],
    progress: Callable[[str], None],
    importance: Mapping[Place, Tensor] = MappingProxyType({}),
) -> TorchSplit:
    """Quantize the named segments; `chunks` are token ids int64 [1, T] of one text, all of one size.

    `importance` is the mean square of what each column of a weight multiplies. Raises LowerError for a segment that
    cannot be quantized.
    """
    prepared_split = transform_segments(torch_split, qnn.prepare, frozenset(recipes))
    in_blocks = [name for name, recipe in recipes.items() if recipe == BLOCKS]
    prepared_split, scales = with_blocks(prepared_split, in_blocks, importance)
    run: dict[str, Any] = {s.name: prepared_split.module(s) for s in prepared_split.split.segments}
    modules = {}
    for name, recipe in recipes.items():
        segment = prepared_split.split.segment(name)
        size = chunks[0].shape[1]
        modules[name] = observed(prepared_split, segment, recipe, soc, size, scales.get(name, {}))
        run[name] = _refusing(name, modules[name])
        progress(f"prepared {name}")
    for number, _ in enumerate(run_chunks(prepared_split, chunks, run), start=1):
        progress(f"calibrated on chunk {number} of {len(chunks)}")
    return _replaced(prepared_split, {name: converted(name, modules[name]) for name in recipes})


def observed(
    torch_split: TorchSplit,
    segment: Segment,
    recipe: str,
    soc: str,
    size: int,
    scales: Mapping[str, Tensor] = MappingProxyType({}),
) -> Any:
    """The segment as a module with observers, exported for `size` rows, or for its range of sizes where it has one.

    `scales` are those of weights that are in blocks, by their names, [N, K/32].
    """
    from executorch.backends.qualcomm.quantizer.quantizer import ModuleQConfig, QnnQuantizer, QuantDtype
    from executorch.backends.qualcomm.utils.utils import get_soc_to_chipset_map
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    with quiet():  # without Qualcomm's whole SDK it cannot check its own rules, and warns of that
        quantizer = QnnQuantizer(soc_model=get_soc_to_chipset_map()[soc])
    config = {"is_linear_per_channel": True, "act_observer": MinMaxObserver}
    quantizer.set_default_quant_config(getattr(QuantDtype, f"use_{recipe}"), **config)
    is_dynamic = isinstance(segment.shape, SizeRanges)
    exported = export_segment(torch_split.module(segment), segment, None if is_dynamic else size)
    if is_dynamic:
        # Only exported does attention have as many keys as it is given: in the model's graph they are the chunk's.
        exported = exported.run_decompositions(dict(REFERENCES))
    module = exported.module(check_guards=False)
    if scales:
        blocks = {node.name: (1, GROUP_SIZE) for node in _linears(module) if node.args[1].target in scales}
        quantizer.set_block_size_map(blocks)
        kept = ModuleQConfig(QuantDtype[f"use_{KEPT}"], **config)
        quantizer.set_submodule_qconfig_list([(lambda node: node.name not in blocks, kept)])
        _with_all_levels(quantizer.default_quant_config)
    with _refusals_of(segment.name):
        prepared = prepare_pt2e(module, quantizer)
    for node in _linears(prepared) if scales else ():
        observer, weight = getattr(prepared, str(node.args[1].target)), node.args[1].args[0]
        if weight.target in scales:
            _know_scales(observer, scales[weight.target])
    return prepared


def _linears(module: fx.GraphModule) -> list[Any]:
    return module.graph.find_nodes(op="call_function", target=aten.linear.default)


def _with_all_levels(config: Any) -> None:
    """Blocks of -8 to 7, which the HTP has; ExecuTorch's own begin at -7."""
    for each in config.per_block_quant_config_list:
        each.weight = replace(each.weight, quant_min=-8)


def _know_scales(observer: Any, scales: Tensor) -> None:
    """Give an observer of blocks the scales that it would have to guess from the largest number."""
    largest = scales * ((observer.quant_max - observer.quant_min) / 2)
    observer.min_val, observer.max_val, observer.calibrated = -largest, largest, True
    observer.original_dtype = scales.dtype


def converted(name: str, observed: Any) -> fx.GraphModule:
    """The module with quantize and dequantize operators, over the scales that its observers found."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with _refusals_of(name):
        found: fx.GraphModule = convert_pt2e(observed)
    return found


def _refusing(name: str, module: Any) -> Callable[..., Any]:
    """The module, whose errors name its segment: QNN's quantizer changes a graph before it puts observers in."""

    def run(*inputs: Tensor) -> Any:
        with _refusals_of(name):
            return module(*inputs)

    return run


@contextmanager
def _refusals_of(name: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except Exception as error:
        way_out = BACKEND.way_out.format(name)
        raise LowerError(f"segment {name}: QNN cannot quantize it ({error}); {way_out}") from error


def _replaced(torch_split: TorchSplit, modules: Mapping[str, fx.GraphModule]) -> TorchSplit:
    """The split with these modules as segments: a structure each, for their scales are part of their graphs."""
    graphs, weights, segments = {}, dict(torch_split.weights), []
    for segment in torch_split.split.segments:
        structure = segment.structure
        if segment.name in modules:
            structure = derived_structure(segment.structure, segment.name)
            graphs[structure], weights[segment.name] = _as_structure(modules[segment.name])
        else:
            graphs[structure] = torch_split.graphs[structure]
        segments.append(replace(segment, structure=structure))
    return TorchSplit(replace(torch_split.split, segments=tuple(segments)), graphs, weights)


def _as_structure(module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The module's graph with its tensors as "w0", "w1", …, and the tensors."""
    graph = copy_graph(module)
    tensors = {node.target: constant(module, node) for node in graph.find_nodes(op="get_attr")}
    number_weights(graph)
    weights = tuple(tensors.values())
    return with_weights(graph, weights), weights
