"""Products with weights are linears, whatever the module calls them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import architectures
from doubleweave.compiler.graph.linears import as_linears
from doubleweave.compiler.split.eager import run_eager
from exports import split_of

aten = torch.ops.aten
X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))


class Product(nn.Module):
    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("compute", "is_linear"),
    [
        (lambda x, w, b: x @ w, True),
        (lambda x, w, b: torch.mm(x[0], w), True),
        (lambda x, w, b: torch.addmm(b, x.view(-1, 8), w).view(1, -1, 6), True),
        (lambda x, w, b: torch.addmm(b, x.view(-1, 8), w).view(-1, 1, 6), True),
        (lambda x, w, b: torch.addmm(b, x[0], w, alpha=2.0), False),
        (lambda x, w, b: torch.addmm(b[:1], x[0], w), False),
        (lambda x, w, b: w.t() @ x[0].t(), False),
        (lambda x, w, b: x[0, 0] @ w, False),
    ],
)
def test_numbers_stay(compute, is_linear):
    module = Product(compute)
    found = torch.export.export(module, (X,)).module()
    as_linears(found)
    found.graph.lint()
    found.recompile()
    with torch.no_grad():
        torch.testing.assert_close(found(X), module(X), rtol=1e-6, atol=1e-6)
    assert bool(found.graph.find_nodes(op="call_function", target=aten.linear.default)) == is_linear


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_models_that_keep_weights_transposed(family):
    module = architectures.tiny_model(family)
    split = split_of(module)
    targets = {node.target for graph in split.graphs.values() for node in graph.graph.nodes}
    assert targets.isdisjoint({aten.addmm.default, aten.matmul.default, aten.mm.default})
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        wanted = module(ids, use_cache=False).logits
        found = run_eager(split, ids)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
