"""Mixtures of experts: the operators against transformers' own modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import architectures
from doubleweave.compiler.graph import experts
from doubleweave.compiler.graph.simplify import fold_constants
from doubleweave.compiler.graph.sliced_products import split_sliced_products
from doubleweave.errors import SplitError

pytestmark = pytest.mark.usefixtures("lowered_once")

TOKENS = np.random.default_rng(0).integers(3, 260, 150)


def rows(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(3))


def module_of(name):
    """The first experts module of a tiny model: of 4 experts, 64 wide."""
    module = next(m for m in architectures.tiny_model(name).modules() if hasattr(m, "_is_expert_parallel"))
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module


# Plain; with biases, gate and up by turns, transposed; transposed; without a gate.
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "aria_text", "nemotron_h"])
def test_experts_are_those_of_transformers(name):
    module = module_of(name)
    x, index, scores = rows(7, 64), torch.randint(0, 4, (7, 2)), rows(7, 2).softmax(1)
    index[:, 1] = (index[:, 0] + 1) % 4
    with torch.no_grad():
        module.config._experts_implementation_internal = "eager"
        wanted = module(x, index, scores)
        with experts.experts_as_operators(module):
            exported = torch.export.export(module, (x, index, scores)).module()
        assert module.config._experts_implementation_internal == "eager"
        targets = [str(node.target) for node in exported.graph.nodes if "doubleweave" in str(node.target)]
        fold_constants(exported)  # a transposed weight is one
        split_sliced_products(exported)
        exported.recompile()
        found = exported(x, index, scores)
    assert targets.count("doubleweave.expert_linear.default") == 2
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    products = exported.graph.find_nodes(
        op="call_function", target=torch.ops.doubleweave.expert_linear.default
    )
    # Gate and up are products of their own, so nothing is sliced.
    assert len(products) == (2 if name == "nemotron_h" else 3)
    left = {str(node.target) for node in exported.graph.nodes}
    assert not left & {"aten.slice.Tensor", "aten.chunk.default", "aten.split.Tensor"}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("has_own_rows", [False, True])
def test_the_quantized_reference_is_a_linear_of_rounded_rows(size, has_own_rows):
    x = rows(6, 2, 96) if has_own_rows else rows(6, 96)
    index = torch.randint(0, 4, (6, 2))
    groups = -(-96 // size)
    weight = torch.randint(-127, 128, (4, 10, groups * size), dtype=torch.int8)
    weight[..., 96:] = 0
    scales = rows(4, 10, groups).abs()
    bias = rows(4, 10)
    found = torch.ops.doubleweave.expert_linear_quantized(x, index, weight, scales, None, None, bias)
    exact = (weight.view(4, 10, groups, size) * scales.unsqueeze(3)).flatten(2)[..., :96]
    # Each number moves by half a step of its group at most.
    steps = (
        torch.cat([part.abs().amax(-1, keepdim=True).expand_as(part) for part in x.split(64, -1)], -1) / 127
    )
    for row in range(6):
        for choice in range(2):
            of_choice = (row, choice) if has_own_rows else row
            of_expert = exact[int(index[row, choice])]
            wanted = of_expert @ x[of_choice] + bias[int(index[row, choice])]
            off = (found[row, choice] - wanted).abs()
            assert (off <= 0.51 * (of_expert.abs() @ steps[of_choice]) + 1e-4).all()


def test_packed_weights_hold_every_weight():
    from doubleweave.compiler.backends.xnnpack import packed_linears

    whole = torch.randint(-127, 128, (3, 20, 128), dtype=torch.int8)
    packed = packed_linears.pack_int8(whole).view(
        3, 2, 2, 16, 16, 4
    )  # two groups of one bundle of two blocks
    for e, n, k in ((0, 0, 0), (2, 19, 127), (1, 15, 4), (1, 16, 77)):
        byte = int(packed[e, k // 64, n // 16, k % 64 // 4, n % 16, k % 4]) & 255
        assert byte == int(whole[e, n, k]) + 128
    narrow = torch.randint(-8, 8, (3, 20, 64), dtype=torch.int8)
    packed = packed_linears.pack_int4(narrow).view(
        3, 2, 2, 4, 16, 4
    )  # two groups of one bundle of two blocks
    for e, n, k in ((0, 0, 0), (2, 19, 63), (1, 15, 4), (1, 16, 43)):
        byte = int(packed[e, k // 32, n // 16, k % 32 // 8, n % 16, k % 4]) & 255
        assert (byte >> 4 if k % 8 >= 4 else byte & 15) == int(narrow[e, n, k]) + 8
    assert torch.equal(packed_linears.pack_float32(rows(3, 20, 5))[2, 1, :, 3], rows(3, 20, 5)[2, 19])


def test_a_router_keeps_its_weights():
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.quantize.weights import quantize
    from doubleweave.compiler.split.split_llm import default_policy, split_llm
    from doubleweave.ir.split import rows as between

    module = architectures.tiny_model("qwen3_moe")
    graph = export_llm(module, 8)
    split = split_llm(graph, owned_modules(module), default_policy(between(1, 8)), max_context=64)
    block = quantize(split, "8da4w").module("block_2")
    weights = {
        node.args[1].target
        for node in block.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if node.args[1].op == "get_attr"
    }
    assert [tuple(block.get_buffer(name).shape) for name in weights] == [(4, 64)]
    # 64 → 4 by the router, 4 heads of 16 back to 64, and 3 products of 2 of the 4 experts; it is the last layer.
    segment = split.split.segment("block_2")
    config = module.config
    of_experts = 2 * 3 * 64 * config.moe_intermediate_size
    assert segment.linear_weights == 64 * 4 + of_experts + 64 * 64


class Rows(torch.nn.Module):
    """A function of x and of experts' weights [8, 6, 8]."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, torch.nn.Parameter(rows(8, 6, 8))

    def forward(self, x):
        return self.function(x, self.weight)


def axis_of_rows(function):
    """The axis of the rows in the result for x [T, 8]."""
    from doubleweave.compiler.graph.nodes import expression, output_node
    from doubleweave.compiler.split.row_rules import Follower

    dims = {"x": {0: torch.export.Dim("T", min=2, max=64)}}
    graph = torch.export.export(Rows(function), (rows(5, 8),), dynamic_shapes=dims).module().graph
    (x,) = graph.find_nodes(op="placeholder")
    follow = Follower({x: 0}, expression(x.meta["val"].shape[0]))
    follow.rows |= dict.fromkeys(graph.find_nodes(op="get_attr"))
    for node in graph.nodes:
        if node.op == "call_function":
            follow.node(node)
    (result,) = output_node(graph).args[0]
    return follow.axis(result)


def test_rows_stay_apart_in_routers_and_experts():
    from doubleweave.compiler.split.row_rules import MixesRows

    ours = torch.ops.doubleweave

    def routed(x, weight):
        scores, index = x.topk(2)
        kept = torch.full_like(x, 0.0).scatter(1, index, 1.0)
        found = ours.expert_linear(x, (x * kept).topk(2)[1], weight)
        return ours.expert_sum(found, x.gather(1, index) + scores)

    assert axis_of_rows(routed) == 0
    for function, reason in (
        (lambda x, w: x.gather(0, x.topk(2)[1]), "gather looks up along the rows"),
        (lambda x, w: x.scatter(0, x.topk(2)[1], 1.0), "scatter.value is along the rows"),
        (lambda x, w: ours.expert_linear(x, x.topk(1)[1], x.unsqueeze(0)), "uses rows as weights"),
    ):
        with pytest.raises(MixesRows, match=reason):
            axis_of_rows(function)


def test_experts_on_several_devices_are_refused():
    module = module_of("mixtral")
    module._is_expert_parallel = True
    with pytest.raises(SplitError, match="spread over devices"):
        experts._experts(module, rows(2, 64), torch.zeros(2, 1, dtype=torch.int64), rows(2, 1))
