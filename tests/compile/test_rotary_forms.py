"""Rotary embedding however a model writes it, positions that models count, and caches that layers share."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import doubleweave as dw
from doubleweave.compiler.graph.export_llm import owned_modules
from doubleweave.compiler.graph.find_rotary import find_rotary
from doubleweave.compiler.graph.positions import check_first
from doubleweave.compiler.graph.rotary_matrix import Column, Turn, turn_of
from doubleweave.compiler.split.eager import run_eager
from doubleweave.compiler.split.llm_rows import check_rows
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.errors import SplitError
from doubleweave.ir.split import rows
from doubleweave.sources.hugging_face import from_module
from doubleweave.sources.positions import first_position
from exports import export_llm

pytestmark = pytest.mark.usefixtures("lowered_once")

ROTARY = torch.ops.doubleweave.rotary.default
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
STREAMS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "laurel_rank": 8,
}
DENSE = {"moe_layers": [], "intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "attention_chunk_size": 256}
ENCODER = {"max_position_embeddings": 130, "is_decoder": True, "pad_token_id": 1}
BART = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "is_decoder": True,
}
# name -> (config class, what it adds, rotary operators)
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "neighbours": ("CohereConfig", {}, 4),
    "neighbours_of_a_part": ("GlmConfig", {"partial_rotary_factor": 0.5}, 4),
    "repeated_in_the_layer": ("Ernie4_5Config", {}, 4),
    "the_other_way_round": ("NanoChatConfig", {}, 4),
    "latent": ("YoutuConfig", LATENT, 4),
    "complex": ("Llama4TextConfig", DENSE, 2),
    "scaled_queries": ("Ministral3Config", {}, 4),
    "streams_and_shared_caches": ("Gemma3nTextConfig", STREAMS, 6),
    "counts_positions": ("BartConfig", BART, 0),
    "counts_from_the_padding": ("RobertaConfig", ENCODER, 0),
}


def make_model(family: str) -> Any:
    torch.manual_seed(len(family))
    name, extra, _ = FAMILIES[family]
    config = getattr(transformers, name)(**COMMON | extra)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights start at one and biases at zero: make them tell.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@cache
def split(family: str) -> tuple[Any, TorchSplit]:
    """The model, and its split, which no test changes."""
    model = make_model(family)
    graph = export_llm(model, 64)
    check_rows(graph, "model")
    policy = default_policy(rows(1, 64))
    return model, split_llm(graph, owned_modules(model), policy=policy, max_context=128)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees_with_the_plain_model(family: str) -> None:
    model, torch_split = split(family)
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(len(family)))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    for chunk in (None, 7, 1):
        found = run_eager(torch_split, ids, chunk)
        assert (found - expected).abs().max() <= 3e-6 * max(1.0, expected.abs().max().item())
    graphs = [torch_split.module(segment).graph for segment in torch_split.split.segments]
    turned = sum(len(graph.find_nodes(op="call_function", target=ROTARY)) for graph in graphs)
    assert turned == FAMILIES[family][2]


def test_order_of_neighbours_is_in_the_weights() -> None:
    """Queries and keys keep the kernel's order of features, so a layer moves none."""
    _, torch_split = split("neighbours")
    targets = {node.target for node in torch_split.module("block_0").graph.nodes}
    aten = torch.ops.aten
    assert not targets & {aten.slice.Tensor, aten.cat.default, aten.stack.default, aten.transpose.int}


def test_shared_caches_are_one_value() -> None:
    parts = split("streams_and_shared_caches")[1].split
    cached = {value.name: value.shape for value in parts.values if value.kind == "cache"}
    assert set(cached) == {"k_0", "v_0", "k_1", "v_1"}
    reads = [call.reads[1:] for call in parts.calls if call.segment.startswith("attention")]
    assert reads == [("k_0", "v_0"), ("k_1", "v_1")] * 2


def test_streams_cross_as_rows() -> None:
    """Gemma 3n's four streams are [4, 1, T, D] in a layer."""
    parts = split("streams_and_shared_caches")[1].split
    assert (1, "T", 4 * 32) in {value.shape for value in parts.values}


def test_scale_of_queries_is_computed_once() -> None:
    parts = split("scaled_queries")[1].split
    readers = [call.name for call in parts.calls if "position_ids" in call.reads]
    assert sorted(readers) == ["block_0", "rotary"]


def test_first_position() -> None:
    model = make_model("counts_from_the_padding")
    assert first_position(model) == 2
    assert from_module(model, "m", None).max_context == 128
    check_first(model, 2)
    with pytest.raises(SplitError, match="other logits than for the positions from 0 on"):
        check_first(model, 0)
    assert first_position(make_model("counts_positions")) == 0


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("neighbours", {"quantize": "8da8w"}),
        ("neighbours_of_a_part", {"quantize": "none", "shape": "static", "chunk": [16, 1]}),
        ("scaled_queries", {"quantize": "none", "attention": "static", "chunk": [16]}),
        ("streams_and_shared_caches", {"quantize": "none"}),
        ("streams_and_shared_caches", {"quantize": "8da8w", "shape": "static", "chunk": [16]}),
        ("counts_from_the_padding", {"quantize": "none"}),
    ],
)
def test_program_is_right(family: str, options: dict[str, Any], tmp_path: Any) -> None:
    """Compiling ends with the check of the program against the source."""
    manifest = dw.compile_llm(
        from_module(make_model(family), family, None), tmp_path / "out", max_context=100, **options
    )
    assert manifest.check is not None
    assert manifest.check.ran == "program"


class _Layer(nn.Module):
    """A projection of two heads whose features are turned, or something like it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.proj = nn.Linear(12, 2 * 8)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        angle = position_ids.float()[..., None] * torch.tensor([1.0, 0.5, 0.25, 0.1])
        q = self.proj(x).view(1, x.shape[1], 2, 8)
        cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
        low, high = q[..., :4], q[..., 4:]
        if self.form == "halves":
            return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        if self.form == "halves of other angles":  # no rotation, but the operator's tables say it
            return torch.cat((low * cos - high * sin, high * sin + low * cos), -1)
        if self.form == "squares":
            return torch.cat((low * cos - high * sin * low, high * cos + low * sin), -1)
        if self.form == "three":
            return torch.cat((low * cos - high * sin + low.roll(1, -1), high * cos + low * sin), -1)
        return torch.cat(
            (low * cos * 2.0 - high * sin, high * cos + low * sin), -1
        )  # scaled by a half of them


@pytest.mark.parametrize(
    ("form", "is_found"),
    [
        ("halves", True),
        ("squares", False),
        ("three", False),
        ("scaled", False),
        ("halves of other angles", False),
    ],
)
def test_what_is_found(form: str, is_found: bool) -> None:
    torch.manual_seed(3)
    layer = _Layer(form).eval()
    inputs = torch.randn(1, 9, 12), torch.arange(9)[None]
    count = torch.export.Dim("T", min=2, max=64)
    graph = torch.export.export(layer, inputs, dynamic_shapes=({1: count}, {1: count})).module()
    wanted = layer(*inputs)
    find_rotary(graph)
    graph.recompile()
    assert bool(graph.graph.find_nodes(op="call_function", target=ROTARY)) == is_found
    assert (graph(*inputs) - wanted).abs().max() < 1e-6


def test_matrix_of_neighbours() -> None:
    table, sine = torch.tensor([0.3, 0.4]), torch.tensor([0.5, 0.6])
    matrix = torch.eye(5)
    for pair in (0, 1):
        a, b = 2 * pair, 2 * pair + 1
        matrix[a, a] = matrix[b, b] = table[pair]
        matrix[a, b], matrix[b, a] = -sine[pair], sine[pair]
    order = (0, 2, 1, 3, 4)
    columns = [tuple(Column(of, pair, 1) for pair in (0, 1, 0, 1)) for of in (0, 1)]
    assert turn_of(matrix, [table, sine]) == Turn(order, order, columns[0], columns[1])


@pytest.mark.parametrize("entry", [0.7, 2.0])
def test_matrix_with_a_number_of_no_table(entry: float) -> None:
    matrix = torch.tensor([[0.3, -0.5], [0.5, 0.3]])
    assert turn_of(matrix, [torch.tensor([0.3]), torch.tensor([0.5])]) is not None
    matrix[0, 0] = entry
    assert turn_of(matrix, [torch.tensor([0.3]), torch.tensor([0.5])]) is None
