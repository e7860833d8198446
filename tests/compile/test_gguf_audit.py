"""The audit of a loaded GGUF file says in a sentence what differs between file and module."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import gguf_files
from doubleweave.sources import gguf_rotary, load
from doubleweave.sources.gguf_file import read_gguf
from gguf_files import CONTEXT, HEADS, HIDDEN, module_of, write

FACTORS = {"rope_freqs.weight": np.linspace(1, 8, HIDDEN // HEADS // 2, dtype=np.float32)}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


def test_a_module_that_is_its_files_passes(tmp_path):
    assert load(write(tmp_path / "a.gguf", module_of(), tensors=FACTORS)).audit() == ""


def test_frequency_factors_that_were_dropped_are_found(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", module_of(), tensors=FACTORS)
    monkeypatch.setattr(gguf_rotary, "apply_frequency_factors", lambda file, module: None)
    assert "the rotary frequencies (model.rotary_emb.inv_freq) differ by up to 7" in load(path).audit()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"rope.freq_base": 500.0}, "the rotary frequencies"),
        ({"rope.scaling.factor": 2.0}, "the rotary frequencies"),
        (YARN, "the rotary frequencies"),
    ],
)
def test_rotary_keys_that_were_dropped_are_found(tmp_path, monkeypatch, keys, said):
    path = write(tmp_path / "a.gguf", module_of(), keys=keys)
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    monkeypatch.setattr(gguf_rotary, "rope_parameters", lambda file, model_type, head_dim: plain)
    assert said in load(path).audit()


def test_a_rotary_scale_that_was_dropped_is_found(tmp_path):
    model = load(write(tmp_path / "a.gguf", module_of(), keys={**YARN, "rope.scaling.attn_factor": 0.5}))
    model.module.model.rotary_emb.attention_scaling = 1.0
    assert "the rotary embedding is scaled by 1 (model.rotary_emb.attention_scaling)" in model.audit()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize(
    "weight", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_tensor_left_at_random_is_found(tmp_path, architecture, weight):
    tied = {"tie_word_embeddings": True} if architecture == "gemma2" else {}
    heads = {"head_dim": HIDDEN // HEADS} if architecture == "gemma2" else {}
    keys = {"attention.sliding_window": CONTEXT} if architecture == "gemma2" else {}
    path = write(tmp_path / "a.gguf", module_of(architecture, **tied, **heads), architecture, keys)
    model = load(path)
    assert model.audit() == ""
    parameter = model.module.get_parameter(weight)
    with torch.no_grad():
        parameter.normal_(generator=torch.Generator().manual_seed(1))
    assert "the tensor " in model.audit()
    assert weight in model.audit()


def test_layers_in_another_order_are_found(tmp_path):
    model = load(write(tmp_path / "a.gguf", module_of()))
    layers = model.module.model.layers
    model.module.model.layers = torch.nn.ModuleList([layers[1], layers[0]])
    assert "the tensor blk.0." in model.audit()


def test_a_tensor_that_was_left_out_is_found(tmp_path):
    """A file with biases, read as one without."""
    from doubleweave.sources.gguf_audit import audit

    wanted = module_of(attention_bias=True)
    path = write(tmp_path / "a.gguf", wanted)
    biases = {name: None for name in gguf_files.tensors_of(wanted, "llama") if name.endswith(".bias")}
    bare = load(write(tmp_path / "b.gguf", wanted, tensors=biases))
    assert bare.audit() == ""
    assert re.search(
        r"the file has \d+ weights beside blk\.0\..*, the module \d+", audit(read_gguf(path), bare.module)
    )
