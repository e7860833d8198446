"""Segments that dequantize their weights quickly give the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch

import toys
from doubleweave.check import quick_weights
from doubleweave.check.quick_weights import quick_modules
from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
from doubleweave.compiler.quantize.weights import quantize
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.ir.split import rows


@pytest.mark.parametrize("features", [4096, 100])
@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_logits_are_equal(recipe, features, monkeypatch):
    monkeypatch.setattr(quick_weights, "FEATURES", features)
    module = toys.module()
    policy = default_policy(rows(1, 16))
    split = split_llm(export_llm(module, 16), owned_modules(module), policy, max_context=toys.MAX_CONTEXT)
    quantized = quantize(split, recipe)
    ids = [torch.arange(11)[None]]
    quick = quick_modules(quantized)
    called = {str(node.target) for graph in quick.graphs.values() for node in graph.nodes}
    assert not {name for name in called if "dequantize_per_channel" in name}
    (wanted,), (found,) = run_chunks(quantized, ids), run_chunks(quantized, ids, quick)
    # A product of fewer features may add up in another order.
    assert torch.equal(found, wanted) if features > 1000 else torch.allclose(found, wanted, atol=1e-5, rtol=0)
