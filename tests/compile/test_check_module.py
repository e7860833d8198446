"""The check that ends a compile finds planted faults, leaves right programs alone, and changes nothing."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import doubleweave as dw
from doubleweave.check import module as check
from doubleweave.check.rounding import Rounding, excess, spread
from doubleweave.compiler.backends.xnnpack import lower as xnnpack

X = torch.linspace(-6, 6, 64).view(4, 16)
ROWS = {"x": {0: Dim("m", min=1, max=50)}}


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


def model(function, **attributes):
    """A module of class Model whose forward is this function of itself and x."""
    found = type("Model", (nn.Module,), {"forward": function})()
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def tanh_gelu(self, x):
    return F.gelu(x, approximate="tanh")


@pytest.fixture
def fault(monkeypatch):
    """XNNPACK takes GELU by tanh for the exact one."""
    monkeypatch.setattr(xnnpack, "_tanh_gelu", lambda graph, node: None)


def test_a_planted_fault_is_found(fault, tmp_path):
    with pytest.raises(
        dw.CheckError, match=r"^Model: result 0 of .* sizes \[4, 16\]: found .*nothing was written"
    ):
        dw.compile(model(tanh_gelu), (X,), out=tmp_path / "program")
    assert not (tmp_path / "program").exists()
    program = dw.compile(model(tanh_gelu), (X,), check=False)
    assert program.manifest.check is None


def test_a_fault_beside_results_by_chance_is_found(fault):
    with pytest.raises(dw.CheckError, match="result 1"):
        dw.compile(model(lambda self, x: (x + 1, tanh_gelu(self, x))), (X,))


@pytest.mark.parametrize(
    "forward", [lambda self, x: Pair(x + 1, tanh_gelu(self, x)), lambda self, x: {"y": [tanh_gelu(self, x)]}]
)
def test_a_fault_inside_a_container_is_found(fault, forward):
    with pytest.raises(dw.CheckError):
        dw.compile(model(forward), (X,))


def test_a_fault_at_an_end_of_a_dim_is_found(monkeypatch):
    """The example has too small numbers to show it."""
    run = check.run

    def wrong(module, call):
        return [result + (len(result) == 50) for result in run(module, call)]

    monkeypatch.setattr(check, "run", wrong)
    with pytest.raises(dw.CheckError, match=r"sizes \[50, 16\]"):
        dw.compile(model(lambda self, x: x * 2), (X,), dynamic_shapes=ROWS)


def test_both_ends_of_the_dims_are_run(monkeypatch):
    seen = []
    compare = check._compare
    monkeypatch.setattr(
        check, "_compare", lambda m, call, p: seen.append(call[0][0].shape[0]) or compare(m, call, p)
    )
    dw.compile(model(lambda self, x: x * 2), (X,), dynamic_shapes=ROWS)
    assert seen == [4, 1, 50]


def test_an_end_that_is_dear_is_left_out(monkeypatch):
    seen = []
    compare = check._compare
    monkeypatch.setattr(
        check, "_compare", lambda m, call, p: seen.append(call[0][0].shape[0]) or compare(m, call, p)
    )
    dims = {"x": {0: Dim("m", min=1, max=1 << 20)}}
    dw.compile(model(lambda self, x: x * 2), (X,), dynamic_shapes=dims)
    assert seen == [4, 1]


RIGHT = {
    "ties": lambda self, x: (x.relu().argmax(-1), x.relu().topk(3)),
    "steps": lambda self, x: ((x / 3 * 3).floor(), (x * 10).round().long(), x > x.flip(0)),
    "nan": lambda self, x: (x.log(), torch.full_like(x, math.nan)),
    "infinities": lambda self, x: (x / 0, x.exp().exp()),
    "argument": lambda self, x: (x, x[1:], x.T),
    "one tensor twice": lambda self, x: (lambda y: [y, y])(x + 1),
    "buffer": lambda self, x: (self.table, x + self.table),
    "integers": lambda self, x: (x.long(), x.int() // 3, x.bool()),
    "cancelled": lambda self, x: (x * 1e4 + 1) - x * 1e4,
    "constants": lambda self, x: {"x": x + 1, "number": 3, "none": None, "text": ["a"]},
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_program_is_left_alone(name):
    found = dw.compile(model(RIGHT[name], table=nn.Buffer(torch.ones(16))), (X,))
    assert found.manifest.check.ran == "program"


def test_a_module_without_tensor_arguments():
    class Table(nn.Module):
        def forward(self, n=2):
            return torch.arange(3).to(torch.bfloat16) * n, torch.ones(2)

    assert dw.compile(Table(), ()).manifest.check.source_off == 0


def test_arguments_of_any_numbers_are_taken():
    garbage = torch.tensor([3e38, -3e38, 1e-42, math.nan, math.inf, -0.0, 1e20, 1.0])
    dw.compile(model(lambda self, x: (x * 2 + 1, torch.sin(x), x.softmax(0), x.sum())), (garbage,))


def test_nothing_of_the_module_changes():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(16))
            self.register_buffer("last", torch.ones(16))
            self.cached = None
            self.unpicklable = (n for n in range(3))

        def forward(self, x):
            random.random()
            np.random.rand()  # noqa: NPY002
            self.cached = x * 2
            self.total.add_(x.sum(0))
            self.last = self.last + 1
            return x + self.total + torch.dropout(x, 0.5, self.training)

    module = Counts().eval()
    last, x = module.last, X.clone()
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    numbers = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    check.run(module, ((x,), {}))
    assert (torch.rand(1), random.random(), np.random.rand()) == numbers  # noqa: NPY002
    assert module.last is last
    assert torch.equal(last, torch.ones(16))
    assert torch.equal(module.total, torch.zeros(16))
    assert module.cached is None
    assert torch.equal(x, X)


def test_hooks_that_a_first_call_adds_are_there_once():
    """transformers' models record hidden states that way. Hooks of a trace that stayed behind would add them twice."""

    class Records(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            if not hasattr(self, "has_hooks"):
                self.layer.register_forward_hook(lambda module, args, output: output + 1)
                self.has_hooks = True
            return self.layer(x)

    module = Records()
    program = dw.compile(module, (X,))
    assert not module.layer._forward_hooks
    with torch.no_grad():
        assert torch.allclose(program(X), module(X), atol=1e-6)
        assert torch.allclose(program(X), module(X), atol=1e-6)


def test_a_module_in_training_mode_stays_in_it():
    module = nn.Sequential(nn.Linear(16, 4), nn.ReLU()).train()
    dw.compile(module, (X,))
    assert module.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_a_program_that_fails_is_refused():
    with pytest.raises(
        dw.CheckError, match=r"the program fails for arguments of sizes \[1, 2, 5, 5, 5\].*convolution"
    ):
        dw.compile(nn.Conv3d(2, 2, 3), (torch.zeros(1, 2, 5, 5, 5),))


def test_a_size_that_the_module_refuses_is_left_out():
    def forward(self, x):
        if x.shape[0] == 1 and not torch.compiler.is_exporting():
            raise ValueError("one row")
        return x + 1

    dw.compile(model(forward), (X,), dynamic_shapes=ROWS)


def test_rounding_moves_ties_and_no_more():
    x = torch.tensor([[0.0, 0.0, 1.0, 5.0, 5.0]])
    with Rounding():
        found = [(x.argmax(-1), x * 2, x.argmin(-1) * 0 + 3) for _ in range(20)]
    wanted = (x.argmax(-1), x * 2, torch.tensor([3]))
    index, twice, three = map(spread, wanted, zip(*found, strict=True))
    assert index.tolist() == [math.inf]
    assert float(twice.max()) < 1e-3
    assert three.tolist() == [0]
    assert excess(torch.tensor([4]), torch.tensor([3]), index) == 0
    assert excess(torch.tensor([4]), torch.tensor([3])) == math.inf
    assert excess(torch.zeros(0), torch.zeros(0)) == 0
    assert excess(torch.zeros(1), torch.zeros(1, 1)) == math.inf
