"""Attention over a cache of fixed length: the same numbers as over one that grows, in eager torch and compiled."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from test_split_llm import FAMILIES, make_model

import architectures
import toys
from doubleweave.compiler.graph.export_llm import owned_modules
from doubleweave.compiler.graph.ops import attention_reference
from doubleweave.compiler.graph.static_attention import (
    MASK,
    for_groups,
    inline_attention,
    mask_of_chunk,
    mask_of_past,
    offsets_in_block,
    offsets_in_chunk,
    static_attention,
)
from doubleweave.compiler.split.eager import run_eager
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.errors import PolicyError
from doubleweave.ir.split import FixedSizes, whole_cache
from exports import export_llm

pytestmark = pytest.mark.usefixtures("lowered_once")

CONTEXT = 64


def split_of(module, attention: str, exported=None):
    graph = exported or export_llm(module, 8)
    owners = owned_modules(module)
    if attention == "static":
        inline_attention(graph, CONTEXT, -1e9)
        owners |= {MASK: MASK}
    return split_llm(
        graph,
        owners,
        default_policy(FixedSizes((1, 8))),
        max_context=CONTEXT,
    )


def assert_alike(module):
    """Over a cache of fixed length the numbers are those of a growing one."""
    exported = export_llm(module, 8)
    static = split_of(module, "static", copy.deepcopy(exported))
    dynamic = split_of(module, "dynamic", exported)
    ids = torch.randint(3, 128, (1, 37))
    expected = run_eager(dynamic, ids, 8)
    for chunk in (8, 5, 1):
        found = run_eager(static, ids, chunk)
        assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_a_growing_cache(family):
    module = make_model(family)
    assert_alike(module)


@pytest.mark.parametrize("name", ["bloom", "granite_swa"])
def test_slopes_and_sinks_are_part_of_it(name):
    module = architectures.with_random_sinks(architectures.tiny_model(name))
    assert_alike(module)


@pytest.mark.parametrize("block", [5, 8, 20])
def test_blocks_are_part_of_the_masks(block):
    generator = torch.Generator().manual_seed(block)
    q, k, v = (torch.randn(1, CONTEXT, width, generator=generator) for width in (32, 16, 16))
    expected = attention_reference(q, k, v, 4, 2, 0.3, 0, 0.0, block)
    past_k, past_v = torch.zeros(1, CONTEXT, 16), torch.zeros(1, CONTEXT, 16)
    for start, end in itertools.pairwise((0, 8, 13, 14, 22)):
        positions = torch.arange(start, end)[None]
        past = mask_of_past(positions, torch.arange(CONTEXT).float(), 0, block, -1e9)
        starts = offsets_in_block(positions, block)
        chunk = mask_of_chunk(offsets_in_chunk(positions), starts, 0, -1e9, 2)
        rows = [x[:, start:end] for x in (q, k, v)]
        found = static_attention(*rows, past_k, past_v, for_groups(past, 2), chunk, 4, 2, 0.3, 0.0)
        assert torch.allclose(found, expected[:, start:end], atol=1e-5)
        past_k[:, start:end], past_v[:, start:end] = rows[1:]


def test_there_is_one_block_and_it_reads_the_whole_cache():
    split = split_of(toys.module(num_layers=3), "static").split
    block = split.segment("block_0")
    assert [call.name for call in split.calls] == ["embed_tokens", "mask", "rotary", "block_0", "lm_head"]
    assert [whole_cache(port) for port in block.inputs].count(CONTEXT) == 2 * 3
    heads = toys.module(num_layers=3).config
    width = heads.num_attention_heads * heads.head_dim
    assert block.attended_width == 3 * 2 * width


@pytest.fixture(scope="module")
def programs(made_once, static_attention_dir):
    import doubleweave

    fixed = {"quantize": "none", "shape": "static", "max_context": CONTEXT}
    made = {"static": doubleweave.open(static_attention_dir)}
    for name, options in (("dynamic", {"chunk": (1, 8)}), ("token", {"chunk": (1,), "attention": "static"})):
        compiled = partial(doubleweave.compile_llm, toys.model(), **fixed, **options)
        made[name] = doubleweave.open(made_once(f"static_attention_{name}", compiled))
    return made


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
@pytest.mark.parametrize("name", ["static", "token"])
def test_compiled_it_gives_the_same_logits_over_several_turns(programs, name, schedule):
    ids = np.random.default_rng(1).integers(0, toys.VOCAB_SIZE, 50)
    turns = []
    for program in (programs["dynamic"], programs[name]):
        session = program.session(schedule, 2)
        found = [session.append(ids[:21]), session.append(ids[21:])]
        session.truncate(9)  # stale rows stay in the cache, behind what the mask shows
        found.append(session.append(ids[30:]))
        found.append(session.append(ids[:1]))
        turns.append(found)
    for expected, found in zip(*turns, strict=True):
        assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def test_every_logit_of_many_chunks_at_once(programs):
    ids = np.random.default_rng(2).integers(0, toys.VOCAB_SIZE, CONTEXT)
    expected, found = (programs[name].session("wavefront", 2).score(ids) for name in ("dynamic", "static"))
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


def test_the_cache_counts_whole(programs):
    session = programs["static"].session("sequential", 1)
    split = programs["static"].split
    whole = CONTEXT * sum(value.row_bytes for value in split.values if value.kind == "cache")
    assert session.kv_bytes == session.kv_bytes_peak == whole


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attention": "fixed"}, "attention: found 'fixed', expected one of dynamic, static"),
        (
            {"attention": "static"},
            "max-context: static attention reads the whole cache in every run; say how many tokens it has, such as "
            "1024",
        ),
        (
            {"attention": "static", "max_context": 64, "shape": "bounded"},
            "shape: found 'bounded', but static attention takes fixed sizes; use static or leave it out",
        ),
        ({"attention_device": "gpu"}, "attention-device: found 'gpu', expected one of cpu, npu"),
        (
            {"attention_device": "npu"},
            "attention-device: found 'npu' with dynamic attention for xnnpack; expected dynamic attention for qnn "
            "(static attention is where the static segments are)",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, sentence):
    import doubleweave

    with pytest.raises(PolicyError) as caught:
        doubleweave.compile_llm(toys.model(), tmp_path / "out", **options)
    assert str(caught.value) == sentence
    assert not (tmp_path / "out").exists()
