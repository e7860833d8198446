"""A context of 131,072 tokens: address space that becomes memory as tokens come, and right numbers at far positions.

The model has one layer, so that of a prompt's chunks only the last attends, over all keys.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os

import numpy as np
import pytest

import doubleweave
from native_runner import needs_runner, report

CONTEXT = 131_072
WIDTH, VOCAB = 16, 4096
PAGE = os.sysconf("SC_PAGESIZE")
IDS = np.random.default_rng(5).integers(2, VOCAB, CONTEXT)


def module():
    """Its queries are large, so that a few keys take nearly all of the weight wherever they stand."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        built.model.layers[0].self_attn.q_proj.weight *= 6
        built.model.layers[0].self_attn.v_proj.weight *= 4
    return built


@pytest.fixture(scope="module")
def folder(made_once):
    from doubleweave.sources.hugging_face import from_module

    return made_once(
        "long_context",
        lambda out: doubleweave.compile_llm(
            from_module(module(), "long", None), out, quantize="none", chunk=(512,)
        ),
    )


@pytest.fixture(scope="module")
def wanted():
    """The logits behind so many tokens, in eager torch: only the last of them attends."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    built = module()
    model, layer = built.model, built.model.layers[0]
    attention = layer.self_attn

    @functools.cache
    @torch.no_grad()
    def logits(length, first=0):
        rows = model.embed_tokens(torch.tensor(IDS[None, :length]))
        normed = layer.input_layernorm(rows)
        q, k, v = (
            project(normed)[:, None] for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = model.rotary_emb(rows, torch.arange(length)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        attended = scaled_dot_product_attention(q[:, :, -1:], k[:, :, first:], v[:, :, first:])[:, 0]
        carried = rows[:, -1:] + attention.o_proj(attended)
        carried = carried + layer.mlp(layer.post_attention_layernorm(carried))
        return built.lm_head(model.norm(carried))[0, 0].numpy()

    return logits


def resident_bytes(session):
    """Of the memory that is reserved for the cache, what the system has given."""
    total = 0
    for region in session._cache_regions.values():
        pages = (ctypes.c_ubyte * -(-region.nbytes // PAGE))()
        assert (
            ctypes.CDLL(None).mincore(ctypes.c_void_p(region.address), ctypes.c_size_t(region.nbytes), pages)
            == 0
        )
        total += PAGE * sum(page & 1 for page in pages)
    return total


def test_a_context_is_reserved_and_committed_as_tokens_come(folder):
    session = doubleweave.open(folder).session("sequential")
    assert session.max_context == CONTEXT
    assert session.kv_bytes == resident_bytes(session) == 0
    session.append(IDS[:1000])
    per_value = -(-1000 * WIDTH * 4 // PAGE) * PAGE
    assert session.kv_bytes == resident_bytes(session) == 2 * per_value
    session.truncate(10)
    assert session.kv_bytes == resident_bytes(session) == 2 * PAGE


@pytest.mark.parametrize(
    ("schedule", "chunk"), [("sequential", 512), ("wavefront", 500), ("out_of_order", 96)]
)
def test_far_positions_are_right_in_any_chunks(folder, wanted, schedule, chunk):
    session = doubleweave.open(folder).session(schedule, chunk=chunk)
    for length in (100_003, CONTEXT):
        found = session.append(IDS[session.length : length])
        np.testing.assert_allclose(found, wanted(length), atol=1e-4 * np.abs(found).max())
    session.truncate(130_000)
    found = session.append(IDS[130_000:130_700])
    np.testing.assert_allclose(found, wanted(130_700), atol=1e-4 * np.abs(found).max())


def test_the_reference_sees_all_keys(wanted):
    """Of the reference alone: its numbers would be others without the far half of the keys."""
    for length in (100_003, 130_700, CONTEXT):
        whole, near = wanted(length), wanted(length, first=CONTEXT // 2)
        assert np.abs(whole - near).max() > 0.05 * np.abs(whole).max()


@needs_runner
def test_doubleweave_run_takes_all_of_it(folder, wanted, tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(IDS.tolist()))
    found = report(folder, "--token-ids", path, "-n", 2)
    assert (found["token_ids"], found["finish"]) == ([int(wanted(CONTEXT).argmax())], "context")
    assert found["kv_bytes_peak"] <= 2 * (CONTEXT + 512) * WIDTH * 4
