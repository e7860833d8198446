"""Code of graphs that is made when somebody asks for it is the code that there would be."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import fx, nn

from doubleweave.compiler.code_when_called import code_made_when_called


class Sum(nn.Module):
    def forward(self, first, second):
        return first + second


def multiply(graph_module: fx.GraphModule) -> None:
    """Change a graph, without its code."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            node.target = torch.mul


@pytest.fixture
def edited():
    """A graph module that was compiled inside, changed, and recompiled."""
    with code_made_when_called():
        graph_module = fx.symbolic_trace(Sum())
        multiply(graph_module)
        graph_module.recompile()
        yield graph_module


ONES, TWOS = torch.ones(2), torch.full((2,), 2.0)


def test_nothing_is_made_before_somebody_asks(edited):
    assert "_code" not in vars(edited)
    assert edited(TWOS, TWOS).tolist() == [4, 4]
    assert "mul" in vars(edited)["_code"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda module: module.code,
        lambda module: str(module),
        lambda module: module.recompile().src,
        lambda module: inspect.getsource(module.forward),
    ],
)
def test_who_reads_the_code_gets_it(edited, ask):
    assert "torch.mul(first, second)" in ask(edited)


def test_arguments_keep_their_names(edited):
    assert list(inspect.signature(edited.forward).parameters) == ["first", "second"]
    edited.recompile()
    assert list(inspect.signature(type(edited).forward).parameters) == ["self", "first", "second"]


def test_copies_have_code_of_their_own(edited):
    copied, shared = copy.deepcopy(edited), copy.copy(edited)
    pickled = pickle.loads(pickle.dumps(edited))
    for module in (copied, shared, pickled):
        assert module(TWOS, TWOS).tolist() == [4, 4]


def test_what_is_not_made_inside_is_made_later():
    with code_made_when_called():
        later = fx.symbolic_trace(Sum())
    assert "_code" not in vars(later)
    assert later(ONES, TWOS).tolist() == [3, 3]


def test_recompiling_is_put_back():
    before = fx.GraphModule.recompile, fx.GraphModule.__reduce__
    with code_made_when_called():
        assert fx.GraphModule.recompile is not before[0]
    assert before == (fx.GraphModule.recompile, fx.GraphModule.__reduce__)
    assert "_code" in vars(fx.symbolic_trace(Sum()))
