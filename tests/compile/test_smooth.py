"""Channels that are scaled: the numbers stay what they were, large ones shrink, and groups on a grid stay on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gguf_files
import toys
from doubleweave.compiler.quantize.channels import Place, find_channels
from doubleweave.compiler.quantize.grids import GROUP_SIZE, format_of
from doubleweave.compiler.quantize.smooth import _columns, _numbers, scaled, smoothed
from doubleweave.compiler.quantize.weights import quantize, rounding
from doubleweave.compiler.split.eager import run_eager
from exports import split_of

IDS = torch.arange(40)[None]


def with_large_channels(module):
    """A channel of each norm, of values and of what gates are multiplied with is a hundred times the others."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter[3] *= 100
            if "v_proj" in name or "up_proj" in name:
                parameter[5] *= 100
    return module


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_stay_what_they_were(is_tied):
    split = split_of(with_large_channels(toys.module(tied=is_tied)))
    scaled = smoothed(split, [IDS]).split
    before, after = run_eager(split, IDS), run_eager(scaled, IDS)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert any(
        not torch.equal(a, b)
        for a, b in zip(split.weights["block_1"], scaled.weights["block_1"], strict=True)
    )


@pytest.mark.parametrize("architecture", sorted(gguf_files.ARCHITECTURES))
def test_every_kind_of_norm_and_gate(architecture):
    split = split_of(gguf_files.module_of(architecture))
    assert find_channels(split)
    before, after = run_eager(split, IDS), run_eager(smoothed(split, [IDS]).split, IDS)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_where_channels_are():
    found = find_channels(split_of(toys.module()))
    # Of each layer two norms, values, and what is multiplied with the gate; and the last norm.
    assert len(found) == 4 * toys.NUM_LAYERS + 1
    assert all(not channels.tables for channels in found)
    tied = find_channels(split_of(toys.module(tied=True)))
    assert [channels.tables for channels in tied if channels.tables] == [(Place("embed_tokens", 0),)]


def test_large_channels_shrink_and_logits_come_nearer():
    split = split_of(with_large_channels(toys.module()))
    scaled = smoothed(split, [IDS]).split
    found = find_channels(split)
    before, after = (_columns(each, found, [IDS]) for each in (split, scaled))
    spread = [[float(x.largest.max() / x.largest.median()) for x in all_of] for all_of in (before, after)]
    assert sum(spread[1]) < 0.3 * sum(spread[0])
    exact = run_eager(split, IDS)
    noise = [(run_eager(quantize(each, "8da8w"), IDS) - exact).square().mean() for each in (split, scaled)]
    assert noise[1] < 0.5 * noise[0]


def test_channels_of_weights_that_are_made_when_asked_for():
    split = split_of(toys.module(tied=True))
    found = find_channels(split)
    once = scaled(split, found, [torch.ones(int(each.of_column.max()) + 1) for each in found])
    once = replace(once, weights=_MadeAnew(once.weights))
    assert [(each.makers, each.readers) for each in find_channels(once)] == [
        (each.makers, each.readers) for each in found
    ]


class _MadeAnew(dict):
    """Weights that are other tensors whenever they are asked for."""

    def __getitem__(self, name):
        return tuple(weight.clone() for weight in super().__getitem__(name))

    def items(self):
        return ((name, self[name]) for name in self)


def test_without_a_text_nothing_is_scaled():
    split = split_of(toys.module())
    assert smoothed(split, []).split is split


def test_groups_stay_on_their_grid():
    module = toys.module()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                levels = torch.randint(0, 16, (parameter.numel() // GROUP_SIZE, GROUP_SIZE))
                low, step = torch.randn(len(levels), 1) * 0.05, torch.rand(len(levels), 1) * 0.02 + 0.005
                parameter.copy_((low + levels * step).view_as(parameter))
    split = split_of(with_large_channels(module))
    grouped, _, free, _ = rounding(split, "8da4w")
    scaled = smoothed(split, [IDS], grouped).split
    assert not free
    assert rounding(split, "8da8w") == (set(), (), set(), 0.5)  # whose columns have a factor each
    assert grouped
    for place in grouped:
        weight, before = (each.weights[place.segment][place.weight] for each in (scaled, split))
        assert format_of(weight.detach().reshape(-1, GROUP_SIZE)) == "int4_offsets"
        assert not torch.equal(weight, before)
    before, after = run_eager(split, IDS), run_eager(scaled, IDS)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_what_is_left_alone_has_its_importance():
    split = split_of(with_large_channels(toys.module()))
    places = [
        place for channels in find_channels(split) for place in channels.readers if place.segment == "block_1"
    ]
    scaled, importance = smoothed(split, [IDS], unscaled=places)
    columns = {
        place: c
        for c, f in zip(_columns(split, find_channels(split), [IDS]), find_channels(split), strict=True)
        for place in f.readers
    }
    for place in places:
        after, before = (each.weights[place.segment][place.weight] for each in (scaled, split))
        factors = after / before  # of rows, where others read what they make
        assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-3)
        assert torch.allclose(importance[place], columns[place].squares / columns[place].count)
    others = [place for place in importance if place not in places]
    assert others
    assert any(not torch.allclose(importance[p], columns[p].squares / columns[p].count) for p in others)


def test_columns_of_a_group_share_a_factor():
    assert _numbers(torch.arange(64)).tolist() == [0] * 32 + [32] * 32
    # Two heads of 32 columns over one of values: both groups have the same channels.
    assert _numbers(torch.arange(32).repeat(2)).tolist() == [0] * 64
    # Heads of 48 columns: each group has columns of two heads, so all share one.
    assert _numbers(torch.arange(48).repeat(2)).tolist() == [0] * 96


def test_a_weight_that_is_used_twice_is_left_alone():
    split = split_of(toys.module())
    weights = dict(split.weights)
    # The first layer's output projection is the second's as well.
    names = [name for name in weights if name.startswith("block_")][1:3]
    shared = weights[names[0]][0]
    weights[names[1]] = (shared, *weights[names[1]][1:])
    found = find_channels(replace(split, weights=weights))
    assert not any(
        place in (Place(names[0], 0), Place(names[1], 0)) for each in found for place in each.readers
    )


def test_a_part_of_what_a_linear_computes_is_left_alone():
    """Keys and values of one linear, of which slices are taken, and values whose heads are turned."""
    from torch import fx

    split = split_of(toys.module())
    name = "block_0"
    structure = split.split.segment(name).structure
    graph = fx.Graph()
    graph.output(graph.graph_copy(split.graphs[structure].graph, {}))
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    values = next(node for node in outputs if "linear" in node.name)
    found = find_channels(split)
    assert any(place.segment == name for each in found if each.port is not None for place in each.makers)
    turned = {}
    for change in ("slice", "transpose"):
        changed = fx.Graph()
        copied: dict = {}
        result = changed.graph_copy(graph, copied)
        node = copied[values]
        with changed.inserting_after(node):
            if change == "slice":
                new = changed.call_function(torch.ops.aten.slice.Tensor, (node, 2, 0, 8))
            else:
                new = changed.call_function(torch.ops.aten.transpose.int, (node, 1, 2))
        new.meta["val"] = node.meta["val"]
        changed.output(tuple(new if each is node else each for each in result))
        graphs = {**split.graphs, structure: fx.GraphModule(split.graphs[structure], changed)}
        turned[change] = find_channels(replace(split, graphs=graphs))
    for each in turned.values():
        assert not any(place.segment == name for c in each if c.port is not None for place in c.makers)
