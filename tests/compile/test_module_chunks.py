"""Modules whose rows are cut into chunks, each against eager torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import doubleweave as dw
from module_trees import SIZES, Both, assert_same, rows


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


class TwoCut(nn.Module):
    """Two arguments with rows on different axes, and one without."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, a, b, w):
        return {"sum": self.fc(a) * b.t() + w, "wide": (a - w).unsqueeze(1)}


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention = Attention()
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, rows, width = x.shape
        q, k, v = (
            part.view(batch, rows, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = self.attention(q, k, v).transpose(1, 2).reshape(batch, rows, width)
        return x + self.out(attended)


T = Dim("T", min=1, max=300)


LENGTHS = (1, 3, 4, 5, 15, 16, 17, 299, 300)  # below, at, above and far above the sizes


@pytest.mark.parametrize(
    ("shape", "axis", "copies"), [((3, 4), 0, 0), ((1, 3, 4), 1, 0), ((3, 5, 4), 1, 3)], ids=str
)
def test_chunks_along_an_axis(shape, axis, copies):
    """With several batches the rows of a chunk do not lie one behind the other: they are copied together."""

    def arguments(n):
        return rows(*shape[:axis], n, *shape[axis + 1 :])

    both = Both(
        nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))),
        (arguments(5),),
        dynamic_shapes={"input": {axis: T}},
        policy={"0": dw.Static(chunk={"input": axis}, sizes=SIZES)},
    )
    for n in LENGTHS:
        both.check(arguments(n))
        both.check_method("0", arguments(n))
    assert list(both.program.methods) == ["0", "0@16", "0@4"]
    x = arguments(4)
    assert_same(both.program.methods["0@4"](x), both.program.methods["0"](x))
    both.program.record = True
    both.check(arguments(32))
    events = both.program.timeline.events
    assert {event.chunk for event in events} == {0, 1}
    assert sum(event.call.endswith("(copy)") for event in events) == (4 if copies else 0)


def test_chunks_of_several_arguments():
    def arguments(n):
        return rows(n, 4), rows(4, n), rows(4)

    both = Both(
        TwoCut(),
        arguments(3),
        dynamic_shapes={"a": {0: T}, "b": {1: T}, "w": None},
        policy={"": dw.Static(chunk={"a": 0, "b": 1}, sizes=SIZES)},
    )
    for n in LENGTHS:
        both.check(*arguments(n))
    with pytest.raises(dw.InputError, match="where T = 3 from what came before"):
        both.program(rows(3, 4), rows(4, 5), rows(4))


def test_whole_module_in_chunks():
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4))
    both = Both(
        module,
        (rows(3, 4),),
        dynamic_shapes=({0: T},),
        policy={"": dw.Static(chunk={"input": 0}, sizes=SIZES)},
    )
    for n in LENGTHS:
        both.check(rows(n, 4))
    (segment,) = both.program.split.segments
    assert (segment.device, segment.shape.sizes) == ("npu", SIZES)
    assert segment.rows == "shown from the graph, and checked in numbers"


def transformer(rule):
    return Both(
        nn.Sequential(Block(), Block()),
        (rows(1, 6, 8),),
        dynamic_shapes={"input": {1: Dim("T", min=1, max=64)}},
        policy={Block: dw.Static(chunk={"x": 1}, sizes=SIZES), Attention: rule},
    )


def test_static_blocks_around_dynamic_attention():
    n = Dim("n", min=1, max=64)
    both = transformer(dw.Dynamic({"q": {2: n}, "k": {2: n}, "v": {2: n}}))
    for length in (1, 4, 6, 17, 64):
        both.check(rows(1, length, 8))
    both.check_method("1", rows(1, 21, 8))
    both.check_method("0.attention", *(rows(1, 2, 9, 4) for _ in range(3)))
    devices = both.devices()
    assert [devices[name] for name in ("0.glue_0", "0.attention", "0.glue_1")] == ["npu", "cpu", "npu"]
    structures = {segment.name: segment.structure for segment in both.program.split.segments}
    assert structures["0.glue_1"] == structures["1.glue_1"]  # lowered once


def test_dynamic_attention_whose_dims_follow_from_its_calls():
    both = transformer(dw.Dynamic())
    both.check(rows(1, 17, 8))
