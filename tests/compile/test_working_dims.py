"""Dims that a module cannot have are refused with dims that it can, and those compile and run at every size."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import doubleweave as dw
from doubleweave.ir.sizes import evaluate, shape_of
from function_module import Of


def rows(*sizes):
    return torch.randn(sizes)


L = Dim("L", min=1, max=64)
A, B = Dim("A", min=1, max=64), Dim("B", min=1, max=64)
X = rows(1, 12, 8)
SHIFT = Of(lambda x: x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1))
CONVS = nn.Sequential(nn.Conv1d(8, 8, 3, 2), nn.Conv1d(8, 8, 3, 2))


def table(x, weight=torch.randn(1, 16, 8)):  # noqa: B008
    return x + weight[:, : x.shape[1]]


# What is exported as it is: torch.export by itself asks for lengths above 1.
RUN = {
    "conv": (nn.Conv1d(8, 8, 3, stride=2, padding=1), (rows(1, 8, 12),), ({2: L},)),
    "shift": (SHIFT, (X,), ({1: L},)),
    "conv2d": (nn.Conv2d(4, 4, 3, 2, 1), (rows(1, 4, 12, 14),), ({2: A, 3: B},)),
}
# Module, arguments, dims, and the dims of the advice.
REFUSED = {
    "pairs": (Of(lambda x: x.reshape(1, -1, 2, 8).sum(2)), (X,), ({1: L},), "2*_L}}}, _L from 1 to 32"),
    "patches": (Of(lambda x: x.reshape(1, -1, 4, 8).mT.reshape(1, -1)), (X,), ({1: L},), "4*_L"),
    "equal": (Of(lambda x, y: x + y), (X, X), ({1: A}, {1: B}), "{1: m}, 1: {1: m}"),
    "one longer": (Of(lambda x, y: x + y[:, 1:]), (X, rows(1, 13, 8)), ({1: A}, {1: B}), "{1: A + 1}"),
    "twice": (Of(lambda x, y: x + y[:, ::2]), (X, rows(1, 24, 8)), ({1: A}, {1: B}), "{1: 2*m}"),
    "last": (Of(lambda x: x[:, -3:] * 2), (X,), ({1: L},), "L from 3 to 64"),
    "window": (Of(lambda x: x.unfold(1, 4, 2)), (X,), ({1: L},), "L from 4 to 64"),
    "pool": (Of(lambda x: F.avg_pool1d(x, 4)), (rows(1, 8, 12),), ({2: L},), "L from 4 to 64"),
    "convs": (CONVS, (rows(1, 8, 33),), ({2: L},), "L from 7 to 64"),
    "difference": (Of(lambda x: x.diff(dim=1)), (X,), ({1: L},), "L from 2 to 64"),
    "two apart": (Of(lambda x: x[:, 2:] - x[:, :-2]), (X,), ({1: L},), "m from 3 to 64"),
    "best": (Of(lambda x: x.topk(3, 1).values), (X,), ({1: L},), "L from 3 to 64"),
    "table": (Of(table), (X,), ({1: L},), "L from 1 to 16"),
    "images": (nn.MaxPool2d(2), (rows(1, 4, 12, 14),), ({2: A, 3: B},), "A from 2 to 64, B from 2 to 64"),
    "product": (Of(torch.matmul), (rows(3, 6), rows(6, 4)), ({1: A}, {0: B}), "m from 1 to 64"),
}  # fmt: skip


def as_dims(module, axes):
    if isinstance(module, Of):
        return {"args": tuple(axes)}
    return tuple(axes)


def advice(message):
    """The dims that a refusal proposes, each letter a Dim of its range."""
    found = re.search(r"dims that would work: (\{.*\})((?:, \w+ from \d+ to \d+)+)$", message)
    assert found, message
    names = re.findall(r"(\w+) from (\d+) to (\d+)", found[2])
    return eval(found[1], {name: Dim(name, min=int(low), max=int(high)) for name, low, high in names})


def check_sizes(program, module):
    """At the ends of each range, near them and in between, the program gives what the module gives."""
    main = program.split.main
    numbers = []
    for _, low, high in main.ranges:
        least = evaluate(low, {})
        numbers.append(sorted({least, least + 1, least + 2, (least + high) // 2, high}))
    for values in itertools.product(*numbers):
        sizes = dict(zip((r.symbol for r in main.ranges), values, strict=True))
        args = [rows(*shape_of(value.shape, sizes)) for value in main.inputs]
        with torch.no_grad():
            torch.testing.assert_close(program(*args), module(*args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", RUN)
def test_lengths_from_one_on(name):
    module, args, axes = RUN[name]
    check_sizes(dw.compile(module, args, dynamic_shapes=as_dims(module, axes)), module)


@pytest.mark.parametrize("name", REFUSED)
def test_followed_advice_works(name):
    module, args, axes, wanted = REFUSED[name]
    with pytest.raises(dw.SplitError, match=re.escape(wanted)) as caught:
        dw.compile(module, args, dynamic_shapes=as_dims(module, axes))
    check_sizes(dw.compile(module, args, dynamic_shapes=advice(str(caught.value))), module)


def test_an_axis_of_one_size_is_named():
    with pytest.raises(dw.SplitError, match=r"it would work with fixed sizes: axis 1 of args\[0\] is 12$"):
        dw.compile(Of(lambda x: x + torch.ones(1, 12, 8)), (X,), dynamic_shapes={"args": ({1: L},)})
