"""GGUF files whose weights stay in them: the numbers, program and refusals of a module that is loaded whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import doubleweave as dw
from doubleweave.errors import SourceError
from doubleweave.sources import load, streamed_module
from doubleweave.sources.file_weights import FileWeight, in_memory
from doubleweave.sources.gguf_file import read_gguf
from doubleweave.sources.saved_tensors import Rows
from gguf_files import (
    CONTEXT,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    logits,
    module_of,
    write,
    write_tensors,
)

pytestmark = pytest.mark.usefixtures("lowered_once")
HEAD_DIM = HIDDEN // HEADS
GEMMA = ({"tie_word_embeddings": True, "head_dim": HEAD_DIM}, {"attention.sliding_window": CONTEXT})
QWEN3 = ({"head_dim": HEAD_DIM}, {"attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM})
# What a module is made with, and its file's keys.
WRITTEN = {
    "llama": ({}, {}),  # queries and keys in another order of rows
    "qwen2": ({}, {}),
    "qwen3": QWEN3,
    "phi3": ({}, {}),
    "gemma2": GEMMA,  # norms are stored with one added
    "gemma3": GEMMA,
    "stablelm": ({}, {}),
    "starcoder2": ({}, {}),
}
SIZES = {
    "context_length": CONTEXT,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "vocab_size": VOCABULARY,
}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}


def gpt2(path):
    """Its weights are turned."""
    size = {"attn_qkv": (3 * HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_up": (96, HIDDEN)}
    size |= {"ffn_down": (HIDDEN, 96), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "position_embd.weight": (CONTEXT, HIDDEN)}
    shapes |= {"output_norm.weight": (HIDDEN,), "output_norm.bias": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in size.items():
            shapes |= {f"blk.{layer}.{name}.weight": shape, f"blk.{layer}.{name}.bias": shape[:1]}
    return write_tensors(path, "gpt2", {**SIZES, "attention.layer_norm_epsilon": 1e-5}, made(shapes))


def qwen3moe(path, **more):
    """Of its experts two tensors are joined."""
    shapes = {"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        size = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN)}
        size |= {"attn_output": (HIDDEN, HIDDEN), "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        size |= {"attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,), "ffn_gate_inp": (4, HIDDEN)}
        size |= {"ffn_gate_exps": (4, 32, HIDDEN), "ffn_up_exps": (4, 32, HIDDEN)}
        size |= {"ffn_down_exps": (4, HIDDEN, 32)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in size.items()}
    keys = {"attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2, **QWEN3[1], **EXPERTS}
    return write_tensors(path, "qwen3moe", {**SIZES, **keys}, made(shapes) | more)


def made(shapes):
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape).astype(np.float32) * np.float32(0.2)
        for name, shape in shapes.items()
    }


@pytest.fixture
def every_weight(monkeypatch):
    """Small models' weights stay in their files as well."""
    monkeypatch.setattr(streamed_module, "LEAST_BYTES", 0)
    monkeypatch.setattr(streamed_module, "_SMALL_BYTES", 0)


@pytest.fixture
def same(request):
    """Both ways of loading a file give the same module."""

    def check(path):
        whole = load(path)
        request.getfixturevalue("every_weight")
        streamed = load(path)
        assert all(isinstance(weight, FileWeight) for weight in streamed.module.parameters())
        wanted, found = whole.module.state_dict(), streamed.module.state_dict()
        assert not any(isinstance(weight, FileWeight) for weight in wanted.values())
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], in_memory(found[name])) for name in wanted)
        buffers = zip(whole.module.buffers(), streamed.module.buffers(), strict=True)
        assert all(torch.equal(one, other) for one, other in buffers)
        configs = [{**model.module.config.to_dict(), "_name_or_path": ""} for model in (whole, streamed)]
        assert configs[0] == configs[1]
        torch.testing.assert_close(logits(whole.module), logits(streamed.module), rtol=1e-6, atol=1e-6)
        assert streamed.audit() == ""

    return check


@pytest.mark.parametrize("architecture", WRITTEN)
def test_the_weights_are_those_of_the_whole_module(tmp_path, same, architecture):
    settings, keys = WRITTEN[architecture]
    same(write(tmp_path / "a.gguf", module_of(architecture, **settings), architecture, keys))


@pytest.mark.parametrize("write_file", [gpt2, qwen3moe])
def test_weights_that_are_turned_or_joined(tmp_path, same, write_file):
    same(write_file(tmp_path / "a.gguf"))


def test_frequency_factors(tmp_path, same):
    factors = {"rope_freqs.weight": np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)}
    same(write(tmp_path / "a.gguf", module_of(), tensors=factors))


def test_mistral(tmp_path, same):
    same(write(tmp_path / "a.gguf", module_of(), keys={"attention.sliding_window": 32}))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_0"])
def test_rows_are_those_of_the_whole_tensor(tmp_path, kind):
    import gguf

    of = gguf.GGMLQuantizationType[kind]
    numbers = np.random.default_rng(0).standard_normal((3, 40, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("some", gguf.quants.quantize(numbers, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "a.gguf")
    whole, rows = file.weights("some"), file.numbers("some")
    assert whole.shape == file.shape("some") == (3, 40, 64)
    assert np.abs(whole - numbers).max() < 0.5
    assert np.array_equal(rows(slice(1, 3)), whole[1:3])
    assert np.array_equal(rows(np.array([[2, 0]])), whole[[[2, 0]]])


def test_a_file_of_the_other_byte_order(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("some", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SourceError, match="byte order of another kind of machine; convert it"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.usefixtures("every_weight")
def test_half_of_a_weight_that_is_missing(tmp_path):
    lost = {"blk.1.ffn_up_exps.weight": None}
    message = r"blk\.1\.ffn_gate_exps\.weight have 8192 numbers for .*gate_up_proj, expected 16384"
    with pytest.raises(SourceError, match=message):
        load(qwen3moe(tmp_path / "a.gguf", **lost))


@pytest.mark.usefixtures("every_weight")
def test_experts_are_read_one_by_one(tmp_path):
    experts = load(qwen3moe(tmp_path / "a.gguf")).module.model.layers[1].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        with weight.opened() as saved:
            assert isinstance(saved, Rows)
        assert torch.equal(torch.cat([block.clone() for block in weight.blocks(1)]), in_memory(weight))


@pytest.mark.usefixtures("every_weight")
def test_the_audit_finds_a_weight_of_another_tensor(tmp_path):
    model = load(write(tmp_path / "a.gguf", module_of()))
    assert model.audit() == ""
    first, second = model.module.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    assert "blk.0.ffn_up.weight" in model.audit()


def test_programs_are_the_same_byte_for_byte(tmp_path, request):
    path = write(tmp_path / "a.gguf", module_of(tie_word_embeddings=True), keys={})
    options = {"quantize": "8da4w", "max_context": 64}
    dw.compile_llm(path, tmp_path / "whole", check=False, **options)
    request.getfixturevalue("every_weight")
    checked = dw.compile_llm(path, tmp_path / "streamed", **options)
    whole, streamed = ((tmp_path / kind / "program.pte").read_bytes() for kind in ("whole", "streamed"))
    assert whole == streamed
    assert checked.check is not None
    assert checked.check.source_off < 1e-5
