"""Linears in blocks of 4 bits as the HTP multiplies them, with an offset for each block beside.

A block's scale has 4 bits itself: it is one to sixteen sixteenths of the largest of its output feature (low-power
block quantization), and it has no offset. What a block's numbers are moved by goes through a linear of its own, which
reads the sums of each block's activations: x W = x (W - C) + (x ones) C, the second term with weights of 8 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import insert, is_call, nodes_of
from doubleweave.compiler.quantize.best_grids import LEVELS, GridSearch, best_grids, levels_on
from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.split.pieces import TorchSplit, derived_structure
from doubleweave.compiler.split.transform import copy_graph, over_empty_weights
from doubleweave.sources.file_weights import in_memory

aten = torch.ops.aten
_SCALES = 16  # that a block's scale can be, of the largest
_MIDDLE = (LEVELS + 1) // 2  # levels are -8 to 7
_TURNS = 2


def with_blocks(
    torch_split: TorchSplit, names: Collection[str], importance: Mapping[Place, Tensor]
) -> tuple[TorchSplit, dict[str, dict[str, Tensor]]]:
    """The split whose named segments have linears over blocks beside linears over their sums, and by segment and name
    of a weight the scales of its blocks, [N, K/32]: the weight is whole numbers from -8 to 7 times them.

    `importance` is the mean square of what each column of a weight multiplies, [K]; without one columns are alike.
    """
    graphs, weights, segments = dict(torch_split.graphs), dict(torch_split.weights), []
    scales: dict[str, dict[str, Tensor]] = {}
    for segment in torch_split.split.segments:
        if segment.name in names:
            graph = copy_graph(torch_split.graphs[segment.structure])
            own = [in_memory(weight) for weight in torch_split.weights[segment.name]]
            scales[segment.name] = _in_blocks(graph, own, segment.name, importance)
            structure = derived_structure(segment.structure, segment.name)
            graphs[structure], weights[segment.name] = over_empty_weights(graph), tuple(own)
            segment = replace(segment, structure=structure)
        segments.append(segment)
    split = replace(torch_split.split, segments=tuple(segments))
    used = {segment.structure: graphs[segment.structure] for segment in segments}
    return replace(torch_split, split=split, graphs=used, weights=weights), scales


def _in_blocks(
    graph: fx.Graph, own: list[Tensor], segment: str, importance: Mapping[Place, Tensor]
) -> dict[str, Tensor]:
    sums: dict[Any, Any] = {}  # of the blocks of a node's rows
    scales: dict[str, Tensor] = {}
    for node in nodes_of(graph):
        if not is_call(node, aten.linear.default) or node.args[1].op != "get_attr":
            continue
        source, weight = node.args[:2]
        number, width = int(weight.target[1:]), int(weight.meta["val"].shape[1])
        if width % GROUP_SIZE:
            continue
        with graph.inserting_before(node):
            if source not in sums:
                ones = torch.eye(width // GROUP_SIZE).repeat_interleave(GROUP_SIZE, dim=1)
                sums[source] = insert(
                    graph, aten.linear.default, source, _read(graph, own, ones, weight), like=node
                )
            each = importance.get(Place(segment, number), torch.ones(width))
            own[number], offsets, scales[weight.target] = blocks_of(own[number].detach(), each)
            moved = insert(
                graph, aten.linear.default, sums[source], _read(graph, own, offsets, weight), like=node
            )
        with graph.inserting_after(node):
            total = graph.call_function(aten.add.Tensor, (node, moved))
        total.meta.update(node.meta)
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
    return scales


def _read(graph: fx.Graph, own: list[Tensor], tensor: Tensor, like: Any) -> Any:
    """A node that reads one weight more."""
    node = graph.get_attr(f"w{len(own)}")
    node.meta["val"] = like.meta["val"].new_empty(tensor.shape)
    own.append(tensor)
    return node


def blocks_of(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [N, K], importance [K] -> the weight without offsets, [N, K], its offsets and its scales, [N, K/32].

    Of the scales next to the best block's own that one is taken whose error counts least.
    """
    groups = weight.reshape(len(weight), -1, GROUP_SIZE)
    best = best_grids(groups, importance)
    unit = best.step.amax(dim=1, keepdim=True) / _SCALES
    nearest = (best.step / unit).round()
    search = GridSearch(groups, importance / importance.mean(), best.step, best.start)
    mean = search.mean(groups)
    for near in (0, -1, 1):
        # The largest stays what it is: the others are sixteenths of it.
        count = torch.where(nearest == _SCALES, nearest, (nearest + near).clamp(1, _SCALES))
        step = count * unit
        start = best.start + (best.step - step) * (LEVELS / 2)
        for _ in range(_TURNS):
            start = mean - step * search.mean(levels_on(groups, step, start))
        search.consider(step, start)
    levels = levels_on(groups, search.step, search.start).sub_(_MIDDLE)
    offsets = search.start + search.step * _MIDDLE
    return levels.mul_(search.step).view_as(weight), offsets.squeeze(2), search.step.squeeze(2)
