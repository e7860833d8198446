"""Attention in a model's own code becomes the operator: the same numbers, its mask and biases known by parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import architectures
from doubleweave.compiler.graph.export_llm import owned_modules
from doubleweave.compiler.graph.general_attention import inline_general
from doubleweave.compiler.graph.nodes import constant
from doubleweave.compiler.graph.ops import ATTENTIONS, GENERAL, attention_reference
from doubleweave.compiler.graph.position_bias import Bias, NotUnderstood, understood
from doubleweave.compiler.graph.static_attention import inline_attention
from doubleweave.compiler.graph.written_attention import keep_other_attention, recognise_attention
from doubleweave.compiler.split.eager import run_eager
from doubleweave.compiler.split.llm_rows import check_rows
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.errors import SplitError
from doubleweave.ir.split import rows
from exports import export_llm

# One of each form: baddbmm over merged heads, one kv head, a window in a buffer, products with a mask, bmm.
WRITTEN = ("bloom", "falcon", "gpt_neo", "openai-gpt", "xglm")


def exported(module, name: str):
    graph = export_llm(module, 64)
    check_rows(graph, name)
    return graph


def attentions(graph):
    return [node for node in graph.graph.nodes if node.target in ATTENTIONS]


def off(module, graph) -> float:
    """How far the split is from the model, over one chunk and over chunks of 13 and single tokens."""
    split = split_llm(graph, owned_modules(module), default_policy(rows(1, 64)), max_context=256)
    ids = torch.randint(3, 260, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = module(input_ids=ids, use_cache=False).logits
    found = [run_eager(split, ids, size) for size in (60, 13, 1)]
    return max(float((logits - wanted).abs().max() / wanted.abs().max()) for logits in found)


@pytest.mark.parametrize("name", WRITTEN)
def test_models_that_write_attention_themselves(name):
    module = architectures.tiny_model(name)
    graph = exported(module, name)
    assert len(attentions(graph)) == 2
    assert off(module, graph) < 5e-6


def test_slopes_are_those_of_the_paper():
    module = architectures.tiny_model("bloom")
    graph = exported(module, "bloom")
    for node in attentions(graph):
        slopes = constant(graph, node.args[10])
        assert torch.allclose(slopes, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))


def test_a_window_in_a_buffer_is_found_where_positions_reach_it():
    config = architectures.tiny_model("gpt_neo").config
    config.window_size = 48
    torch.manual_seed(0)
    module = type(architectures.tiny_model("gpt_neo"))(config).eval()
    graph = exported(module, "gpt_neo")
    assert [node.args[6] for node in attentions(graph)] == [0, 48]
    assert off(module, graph) < 5e-6


def test_scaled_dot_product_attention_is_written_out():
    import transformers

    config = architectures.tiny_model("falcon").config
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    assert off(module, exported(module, "falcon")) < 5e-6
    assert module.config._attn_implementation == "sdpa"  # as it was


@pytest.mark.parametrize("name", ["flint", "granite_swa"])
def test_sinks_are_inputs_of_the_operator(name):
    module = architectures.with_random_sinks(architectures.tiny_model(name))
    graph = exported(module, name)
    sinks = [constant(graph, node.args[9]) for node in attentions(graph)]
    assert len(sinks) == 2
    assert all(numbers.abs().min() > 0 for numbers in sinks)
    assert off(module, graph) < 5e-6


def test_attentions_over_the_same_queries_and_keys_are_one():
    module = architectures.tiny_model("diffllama")
    graph = exported(module, "diffllama")
    assert len(attentions(graph)) == 2  # of two layers
    assert off(module, graph) < 5e-6


def test_a_mask_in_blocks_is_a_block(monkeypatch):
    from transformers.masking_utils import create_chunked_causal_mask
    from transformers.models.llama import modeling_llama

    module = architectures.tiny_model("llama")
    module.config.attention_chunk_size = 50
    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_chunked_causal_mask)
    graph = exported(module, "llama")
    assert [(node.args[6], node.args[8]) for node in attentions(graph)] == [(0, 50)] * 2
    assert off(module, graph) < 5e-6


# A mask that follows from keys, or of keys that an index chose; one of pictures and text; biases that queries make.
@pytest.mark.parametrize("name", ["doge", "deepseek_v32", "inkling_text", "inkling2_text"])
def test_other_attention_is_kept_over_cached_keys(name):
    module = architectures.tiny_model(name)
    graph = exported(module, name)
    assert graph.graph.find_nodes(op="call_function", target=GENERAL)
    assert off(module, graph) < 5e-6


def test_other_attention_has_no_static_form():
    graph = export_llm(architectures.tiny_model("doge"), 64)
    with pytest.raises(SplitError, match=r"layers\.0\.self_attn \(DogeAttention\) stays in the model's own"):
        inline_attention(graph, 128, -1e4)


def test_an_index_chooses_among_fewer_keys_than_it_could():
    config = architectures.tiny_model("deepseek_v32").config
    config.index_topk = 40  # a chunk of 13 has fewer
    torch.manual_seed(0)
    module = type(architectures.tiny_model("deepseek_v32"))(config).eval()
    assert off(module, exported(module, "deepseek_v32")) < 5e-6


def test_what_attention_is_handed_and_is_not_known_is_refused_by_name(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention,
        "forward",
        lambda self, *args, **more: forward(self, *args, token_bias=1.0, s_aux=torch.zeros(4), **more),
    )
    with pytest.raises(SplitError, match="hands its attention token_bias"):
        export_llm(architectures.tiny_model("llama"), 64)


class Written(nn.Module):
    """One attention of two heads over x [1, T, 8]; `weights` makes weights of scores [1, 2, T, T] and positions."""

    def __init__(self, weights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, input_ids, position_ids):
        x = torch.nn.functional.one_hot(input_ids, 8).float()
        heads = (x * 0.7).view(1, -1, 2, 4).transpose(1, 2)
        scores = heads @ (heads + 1).transpose(2, 3)
        return (self.weights(scores, position_ids) @ heads).transpose(1, 2).reshape(1, -1, 8)


def recognised(weights):
    example = (torch.arange(21)[None] % 8, torch.arange(21)[None])
    length = torch.export.Dim("T", min=2, max=64)
    exported = torch.export.export(
        Written(weights), example, dynamic_shapes=({1: length}, {1: length}), strict=False
    )
    graph = exported.module(check_guards=False)
    recognise_attention(graph, "Written")
    keep_other_attention(graph, "Written")
    (found,) = [node for node in graph.graph.nodes if node.target in (*ATTENTIONS, GENERAL)]
    inline_general(graph.graph)
    graph.recompile()
    wanted = Written(weights)(*example)
    assert torch.allclose(graph(*example), wanted, atol=1e-5)
    return found


def causal(positions):
    return positions[0][:, None] >= positions[0][None]


def test_a_cap_and_a_scale_are_found():
    def weights(scores, positions):
        capped = torch.tanh(scores * 0.3 / 5) * 5
        return torch.where(causal(positions), capped, -1e9).softmax(-1)

    node = recognised(weights)
    assert node.args[5] == pytest.approx(0.3, rel=1e-3)
    assert node.args[7] == pytest.approx(5)


@pytest.mark.parametrize(
    "weights",
    [
        lambda scores, positions: torch.where(causal(positions), scores.square(), -1e9).softmax(-1),
        lambda scores, positions: (
            torch.where(causal(positions), scores - (positions[0][:, None] % 7) * (positions % 5), -1e9)
        ).softmax(-1),
        lambda scores, positions: 0.5 * torch.where(causal(positions), scores, -1e9).softmax(-1),
        lambda scores, positions: torch.where(
            causal(positions) & ((positions[0][:, None] - positions[0][None]) % 2 == 0), scores, -1e9
        ).softmax(-1),
    ],
)
def test_what_is_not_the_operator_is_kept(weights):
    assert recognised(weights).target is GENERAL


def test_what_sees_later_keys_is_refused_with_its_cause():
    with pytest.raises(
        SplitError, match="queries see later keys: the mask is not causal, and tokens 0 to 1 of 5"
    ):
        recognised(lambda scores, positions: scores.softmax(-1))


@pytest.mark.parametrize(("window", "block"), [(0, 0), (1, 0), (7, 0), (0, 1), (0, 9), (40, 0), (0, 40)])
@pytest.mark.parametrize("has_slopes", [False, True])
def test_a_bias_is_read_from_its_numbers(window, block, has_slopes):
    slopes = torch.tensor([0.5, 0.1, 1e-3]) if has_slopes and 1 not in (window, block) else None
    bias = Bias(window, block, slopes)
    # Softmax leaves out what all keys of a query have in common.

    def at_size(size):
        return bias.scores(size) + torch.arange(size).view(1, -1, 1)

    found = understood({size: at_size(size) for size in (3, 24, 41)}, at_size)
    if 1 in (window, block):  # each query sees itself alone, by either
        window, block = found.window, found.block
        assert 1 in (window, block)
    assert (found.window, found.block) == (window, block)
    assert (found.slopes is None) == (slopes is None)
    assert slopes is None or torch.allclose(found.slopes, slopes, atol=1e-6)


def test_heads_that_see_different_keys_are_not_understood():

    def at_size(size):
        return torch.cat((Bias(0, 0, None).scores(size), Bias(5, 0, None).scores(size)))

    with pytest.raises(NotUnderstood, match="heads see different keys"):
        understood({24: at_size(24)}, at_size)


@pytest.mark.parametrize("num_queries", [1, 3, 30])
@pytest.mark.parametrize("kind", ["sinks", "slopes", "block", "all"])
def test_the_kernel_is_the_reference(kind, num_queries):
    from doubleweave import _native

    generator = torch.Generator().manual_seed(num_queries)
    q, k, v = (
        torch.randn(1, size, heads * width, generator=generator)
        for size, heads, width in ((num_queries, 6, 20), (90, 2, 20), (90, 2, 36))
    )
    more = {
        "block": 37 if kind in ("block", "all") else 0,
        "sinks": torch.randn(6, generator=generator) if kind in ("sinks", "all") else None,
        "slopes": torch.rand(6, generator=generator) if kind in ("slopes", "all") else None,
    }
    wanted = attention_reference(q, k, v, 6, 2, 0.2, 50, 4.0, **more)
    before = _native.attention_isa()
    try:
        for isa in ("baseline", "avx2", "avx512", "neon"):
            if _native.set_attention_isa(isa):
                out = torch.empty_like(wanted)
                _native.attention(
                    *(x.numpy() for x in (q, k, v, out)),
                    num_heads=6,
                    num_kv_heads=2,
                    scale=0.2,
                    window=50,
                    soft_cap=4.0,
                    **{name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in more.items()},
                )
                assert torch.allclose(out, wanted, atol=2e-6), isa
    finally:
        _native.set_attention_isa(before)
