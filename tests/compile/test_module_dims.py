"""Dims that follow from calls, are derived, or nested, each against eager torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import doubleweave as dw
from module_trees import Around, Basic, Both, rows


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


class Longer(nn.Module):
    """Its first argument has twice as many rows as its second."""

    def forward(self, a, b):
        return a[: b.shape[0]] + b


class CallsLonger(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Longer()

    def forward(self, x):
        return self.inner(torch.cat((x, x)), x)


class Halves(nn.Module):
    """Adds the halves of its first argument: that it has twice as many rows matters."""

    def forward(self, a, b):
        return a.reshape(2, b.shape[0], b.shape[1]).sum(0) + b


def test_dims_follow_from_the_calls():
    """An axis is dynamic where the calls of a module differ, or vary themselves."""
    both = Both(
        Basic(),
        (rows(3, 6), rows(6, 3)),
        dynamic_shapes={"x": None, "y": None},
        policy={"MatMul": dw.Dynamic()},
    )
    both.check(rows(3, 6), rows(6, 3))
    (segment,) = both.program.split.segments
    assert [tuple(r)[1:] for r in segment.shape.ranges] == [(3, 6), (3, 6)]
    both.check_method("MatMul", rows(3, 4), rows(4, 5))
    with pytest.raises(dw.InputError, match=r"found shape \[4, 4\], expected \[3, "):
        both.program.methods["MatMul"](rows(4, 4), rows(4, 5))


def test_nested_dims_keep_their_own_range():
    """The whole module is narrower than the module that it calls."""
    both = Both(
        Around(nn.Linear(4, 4)),
        (rows(3, 4),),
        dynamic_shapes=({0: Dim("T", min=2, max=8)},),
        policy={"inner": dw.Dynamic(({0: Dim("wide", min=1, max=100)},))},  # by position
    )
    for n in (2, 8):
        both.check(rows(n, 4))
    for n in (1, 100):
        both.check_method("inner", rows(n, 4))
        with pytest.raises(dw.InputError, match=rf"with T in 2\.\.8: T is {n}"):
            both.program(rows(n, 4))
    ranges = {f.name: [tuple(r) for r in f.ranges] for f in both.program.split.functions}
    assert ranges == {"": [("T", 2, 8)], "inner": [("wide", 1, 100)]}


def test_dims_of_the_whole_module_in_the_policy():
    n = Dim("n", min=1, max=9)
    both = Both(nn.Linear(4, 4), (rows(3, 4),), policy={"": dw.Dynamic({"input": {0: n}}, device="gpu")})
    for size in (1, 9):
        both.check(rows(size, 4))
    assert both.devices() == {"glue_0": "gpu"}


def test_derived_dims():
    k = Dim("k", min=1, max=9)
    both = Both(Longer(), (rows(4, 3), rows(2, 3)), dynamic_shapes={"a": {0: 2 * k}, "b": {0: k}})
    for n in (1, 2, 9):
        both.check(rows(2 * n, 3), rows(n, 3))
    with pytest.raises(dw.InputError, match=r"a: found shape \[4, 3\], expected \[2\*k, 3\].*where k = 3"):
        both.program(rows(4, 3), rows(3, 3))


def test_derived_dims_that_matter():
    k = Dim("k", min=1, max=9)
    both = Both(Halves(), (rows(4, 3), rows(2, 3)), dynamic_shapes={"a": {0: 2 * k}, "b": {0: k}})
    for n in (1, 2, 9):
        both.check(rows(2 * n, 3), rows(n, 3))


def test_derived_dims_of_a_nested_module():
    k = Dim("k", min=1, max=9)
    both = Both(
        CallsLonger(),
        (rows(3, 4),),
        dynamic_shapes={"x": {0: Dim("n", min=1, max=5)}},
        policy={"inner": dw.Dynamic({"a": {0: 2 * k}, "b": {0: k}})},
    )
    for n in (1, 3, 5):
        both.check(rows(n, 4))
    both.check_method("inner", rows(18, 4), rows(9, 4))


def test_derived_dim_alone():
    k = Dim("k", min=1, max=9)
    both = Both(nn.ReLU(), (rows(6, 3),), dynamic_shapes={"input": {0: 2 * k}})
    for n in (18, 4, 2):
        both.check(rows(n, 3))
