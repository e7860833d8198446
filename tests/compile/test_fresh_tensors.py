"""Tensors that are made empty and filled part by part: at every size, in any module."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

import doubleweave as dw
from doubleweave.compiler.graph import fresh_tensors
from doubleweave.compiler.trace import cut_out
from doubleweave.errors import LowerError

ROWS = {"x": {1: Dim("T", min=1, max=128)}}


def parts(x):
    """As multi-head latent attention puts a key together."""
    found = x.new_empty(1, x.shape[1], 12)
    found[..., :8] = x
    found[..., 8:] = x[..., :1]
    return found


def backwards(x):
    found = torch.empty(1, x.shape[1], 12)
    found[..., 10:] = 2 * x[..., :2]
    found[..., :10] = 1
    return found


def twice(x):
    found = x.new_empty(1, x.shape[1], 8)
    found[...] = x
    found[..., 2:6] = 0
    found[..., 0] = 7
    return found


def shifted(x):
    found = torch.empty_like(x)
    found[:, 1:] = x[:, :-1]
    found[:, :1] = 0
    return found


def counted(x):
    found = torch.empty(x.shape[1], dtype=torch.int64)
    return found.fill_(3) + torch.arange(x.shape[1])


@pytest.mark.parametrize("function", [parts, backwards, twice, shifted, counted])
def test_filled_part_by_part(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x * 2)

    program = dw.compile(Model(), (torch.randn(1, 12, 8),), dynamic_shapes=ROWS)
    for length in (1, 2, 33, 75, 128):
        x = torch.randn(1, length, 8)
        torch.testing.assert_close(program(x), Model()(x))


def test_a_size_that_is_lost_is_refused(monkeypatch):
    """ExecuTorch plans `empty` of a dynamic size for the example."""
    monkeypatch.setattr(cut_out, "without_empty", lambda graph_module: None)

    class Model(nn.Module):
        def forward(self, x):
            return x.new_empty(1, x.shape[1], 8).copy_(x) + 1

    with pytest.raises(
        LowerError, match=r"glue_0: xnnpack lowers it for x of at most \[1, 33, 8\], expected \[1, 128, 8\]"
    ):
        dw.compile(Model(), (torch.randn(1, 12, 8),), dynamic_shapes=ROWS)


def test_writes_become_one_concatenation():
    class Model(nn.Module):
        def forward(self, x):
            return parts(x)

    graph_module = torch.export.export(Model(), (torch.randn(1, 3, 8),)).run_decompositions({}).module()
    fresh_tensors.without_empty(graph_module)
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    assert names.count("aten.cat.default") == 1
    assert not any("scatter" in name or "empty" in name for name in names)
