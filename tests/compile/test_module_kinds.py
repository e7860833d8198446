"""What goes in and out as it is, and kinds of tensors and layers, each against eager torch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import doubleweave as dw
from module_trees import Around, Both, Counter, assert_same, rows


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids, mask, x):
        found = torch.where(mask[..., None], self.embedding(ids).double(), x.softmax(-1))
        return found, ids * 2 + 1, mask.logical_not()


class AsIs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        z = self.fc(x)
        return y, x, z, z, (y,)


class ReturnsParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("fixed", torch.randn(2))

    def forward(self, x):
        return x + 1, self.weight, self.fixed


def test_inputs_and_results_returned_several_times():
    both = Both(AsIs(), (rows(3, 4), rows(2)))
    x, y = rows(3, 4), rows(2)
    both.check(x, y)
    got = both.program(x, y)
    assert got[2] is got[3]
    assert got[0].data_ptr() != y.data_ptr()  # results are the caller's own


@pytest.mark.parametrize("module", [nn.Identity(), Around(nn.Identity())], ids=["whole", "nested"])
def test_module_that_computes_nothing(module):
    both = Both(module, (rows(3, 4),), policy={nn.Identity: dw.Dynamic()})
    both.check(rows(3, 4))


def test_parameter_returned():
    both = Both(ReturnsParameter(), (rows(3, 4),))
    both.check(rows(3, 4))


def test_integers_bools_and_float64():
    batch = Dim("batch", min=1, max=5)
    both = Both(
        Masked(),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]]), rows(1, 3, 4).double()),
        dynamic_shapes={"ids": {0: batch}, "mask": {0: batch}, "x": {0: batch}},
        policy={"embedding": dw.Static(chunk={"input": 0}, sizes=(2,))},
    )
    for n in (1, 2, 5):
        both.check(torch.randint(0, 10, (n, 3)), torch.rand(n, 3) > 0.5, rows(n, 3, 4).double())
    dtypes = [value.dtype for value in both.program.split.main.inputs]
    assert dtypes == ["int64", "bool", "float64"]


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, n, offset=0.5):
        return self.weight * n + offset


def test_without_tensor_arguments():
    both = Both(Table(), (3,))
    with torch.no_grad():
        want = both.eager(3)
    got = both.program(3)  # nothing says that the caller wants torch's tensors
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x):
        out, (h, c) = self.lstm(x)
        return {"out": out, "state": (h, c)}


def test_recurrent_in_eval_mode():
    both = Both(Recurrent().eval(), (rows(1, 2, 4),), policy={"lstm": dw.Dynamic()})
    both.check(rows(1, 2, 4))


def test_convolutions():
    length, batch = Dim("length", min=4, max=32), Dim("batch", min=1, max=9)
    one = Both(
        nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.ReLU()),
        (rows(2, 3, 8),),
        dynamic_shapes={"input": {2: length}},
    )
    two = Both(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2)).eval(),
        (rows(2, 3, 8, 8),),
        dynamic_shapes={"input": {0: batch}},
        policy={"": dw.Static(chunk={"input": 0}, sizes=(1, 4))},
    )
    for n in (4, 9, 32):
        one.check(rows(2, 3, n))
    for n in (1, 4, 6, 9):
        two.check(rows(n, 3, 8, 8))


def test_without_a_policy_all_is_one_segment():
    module = nn.Sequential(nn.Linear(4, 4), Counter(), nn.Softmax(-1))
    before = copy.deepcopy(module.state_dict())
    both = Both(module, (rows(3, 4),))
    for _ in range(3):
        both.check(rows(3, 4))
    assert list(both.program.methods) == ["glue_0"]
    # The module itself is as it was.
    assert_same(dict(module.state_dict()), dict(before))
    assert not any("forward" in vars(found) for found in module.modules())
