"""A key of a GGUF file changes the loaded model as transformers' own setting does, or is refused by its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gguf_files
from doubleweave.errors import SourceError
from gguf_files import CONTEXT, HEADS, HIDDEN, LAYERS, module_of, write

HEAD = HIDDEN // HEADS
SHORT, LONG = np.linspace(1, 1.5, HEAD // 2), np.linspace(1, 4, HEAD // 2)
FACTORS = {
    "rope_factors_short.weight": SHORT.astype(np.float32),
    "rope_factors_long.weight": LONG.astype(np.float32),
}


def rope(kind="default", theta=10000.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def yarn(**more):
    return rope("yarn", factor=4.0, original_max_position_embeddings=32, **more)


def longrope(**more):
    given = {"factor": CONTEXT / 32, "original_max_position_embeddings": 32, **more}
    return rope("longrope", short_factor=SHORT.tolist(), long_factor=LONG.tolist(), **given)


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
}
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 32}
# (architecture, transformers' settings, the file's keys, its further tensors)
HONOURED = {
    "freq_base": ("llama", rope(theta=500.0), {"rope.freq_base": 500.0}, {}),
    "no freq_base": ("qwen2", rope(), {}, {}),
    "linear": (
        "llama",
        rope("linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "a factor alone": ("llama", rope("linear", factor=3.0), {"rope.scaling.factor": 3.0}, {}),
    "scale_linear": ("llama", rope("linear", factor=2.0), {"rope.scale_linear": 2.0}, {}),
    "none": ("llama", rope(), {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "yarn": ("llama", yarn(), YARN, {}),
    "yarn of qwen2": ("qwen2", yarn(), YARN, {}),
    "yarn of qwen3": ("qwen3", {"head_dim": HEAD, **yarn()}, YARN, {}),
    "yarn by the context": (
        "llama",
        {**yarn(), **rope("yarn", factor=4.0, original_max_position_embeddings=CONTEXT)},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
        {},
    ),
    "yarn's betas": (
        "llama",
        yarn(beta_fast=16.0, beta_slow=2.0),
        {**YARN, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        {},
    ),
    "yarn's attn_factor": (
        "llama",
        yarn(attention_factor=0.5 * (0.1 * np.log(4.0) + 1)),
        {**YARN, "rope.scaling.attn_factor": 0.5},
        {},
    ),
    "longrope": (
        "phi3",
        longrope(attention_factor=1.25),
        {**LONGROPE, "rope.scaling.attn_factor": 1.25},
        FACTORS,
    ),
    "longrope without a type": (
        "phi3",
        longrope(attention_factor=1.0),
        {"rope.scaling.original_context_length": 32},
        FACTORS,
    ),
    "a part of each head": (
        "phi3",
        {"partial_rotary_factor": 0.5},
        {"rope.dimension_count": HEAD // 2},
        {},
    ),
    "a part of each head of stablelm": (
        "stablelm",
        {"partial_rotary_factor": 0.5, "use_parallel_residual": False},
        {"rope.dimension_count": HEAD // 2},
        {},
    ),
    "parallel residual": (
        "stablelm",
        {"partial_rotary_factor": 1.0, "use_parallel_residual": True, "use_qkv_bias": True},
        {"use_parallel_residual": True},
        {},
    ),
    "head sizes": (
        "llama",
        {"head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
        {},
    ),
    "head sizes of qwen3": (
        "qwen3",
        {"head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32},
        {},
    ),
    "epsilon": (
        "llama",
        {"rms_norm_eps": 0.1},
        {"attention.layer_norm_rms_epsilon": 0.1},
        {},
    ),
    "epsilon of starcoder2": (
        "starcoder2",
        {"norm_epsilon": 0.1},
        {"attention.layer_norm_epsilon": 0.1},
        {},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, {}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}, {}, {}),
    "as many heads for keys": (
        "qwen2",
        {"num_key_value_heads": HEADS},
        {"attention.head_count_kv": None},
        {},
    ),
    "window of phi3": ("phi3", {"sliding_window": 16}, {"attention.sliding_window": 16}, {}),
    "window of llama": (
        "llama",
        {"model_type": "mistral", "sliding_window": 16},
        {"attention.sliding_window": 16},
        {},
    ),
    "a window as wide as the context": ("qwen2", {}, {"attention.sliding_window": CONTEXT}, {}),
    "named mistral": ("llama", {}, {"general.name": "mistral"}, {}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": HEAD,
            "query_pre_attn_scalar": HEAD,
            "sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
        {
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        {},
    ),
    "attention scale": (
        "gemma2",
        {"head_dim": HEAD, "query_pre_attn_scalar": 4, "sliding_window": 16, "tie_word_embeddings": True},
        {"attention.scale": 0.5, "attention.sliding_window": 16},
        {},
    ),
    "gemma3": (
        "gemma3",
        {
            "head_dim": HEAD,
            "query_pre_attn_scalar": HEAD,
            "sliding_window": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        {
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": [False, True],
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 500.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_a_key_changes_the_model_as_transformers_setting_does(tmp_path, name):
    from doubleweave.sources import load

    architecture, settings, keys, tensors = HONOURED[name]
    wanted = module_of(architecture, **settings)
    model = load(write(tmp_path / "a.gguf", wanted, architecture, keys, tensors))
    for num_tokens in (20, 60):  # on both sides of what longrope was trained on
        assert torch.allclose(
            gguf_files.logits(model.module, num_tokens),
            gguf_files.logits(wanted, num_tokens),
            rtol=1e-4,
            atol=1e-5,
        )
    assert model.audit() == ""
    assert model.max_context == CONTEXT


@pytest.mark.parametrize("name", [name for name in HONOURED if HONOURED[name][1]])
def test_the_setting_shows_in_the_numbers(name):
    """A case whose setting changes nothing would show nothing."""
    architecture, settings, keys, _ = HONOURED[name]
    if not keys or name in ("none", "yarn by the context", "as many heads for keys"):
        pytest.skip("the setting is transformers' own default")
    same_shapes = {
        key: value
        for key, value in settings.items()
        if key in ("head_dim", "tie_word_embeddings", "num_key_value_heads", "use_qkv_bias", "model_type")
    }
    if "use_parallel_residual" in settings:
        same_shapes["use_parallel_residual"] = settings["use_parallel_residual"]
    if same_shapes.keys() >= settings.keys():
        pytest.skip("the setting is one of shapes, which files of another do not load with")
    plain = module_of(architecture, **same_shapes)
    assert not torch.allclose(
        gguf_files.logits(plain), gguf_files.logits(module_of(architecture, **settings))
    )


def test_rope_freqs_divide_the_frequencies(tmp_path):
    from doubleweave.sources import load

    llama3 = rope(
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    wanted = module_of(**llama3)
    plain = 10000.0 ** -(np.arange(0, HEAD, 2) / HEAD)
    factors = (plain / wanted.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    model = load(write(tmp_path / "a.gguf", wanted, tensors={"rope_freqs.weight": factors}))
    assert torch.allclose(gguf_files.logits(model.module), gguf_files.logits(wanted), rtol=1e-4, atol=1e-5)
    assert model.audit() == ""


REFUSED = {
    "rope.scaling.type": "nonsense",
    "rope.scaling.attn_factor": 1.5,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_beta_fast": 16.0,
    "rope.dimension_count": HEAD // 2,
    "rope.freq_base_swa": 500.0,
    "rope.dimension_sections": [4, 2, 2, 0],
    "attention.value_length": 8,
    "attention.causal": False,
    "attention.scale": 0.5,
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 8.0,
    "attention.sliding_window_pattern": 3,
    "attention.temperature_length": 64,
    "attention.head_count_kv": [1, 2],
    "feed_forward_length": [96, 48],
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "embedding_scale": 12.0,
    "residual_scale": 0.2,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_weights_scale": 2.5,
    "leading_dense_block_count": 1,
    "nextn_predict_layers": 1,
    "pooling_type": 1,
    "use_parallel_residual": True,
    "something.new": "x",
    "context_length": None,
    "attention.layer_norm_rms_epsilon": None,
    "general.type": "adapter",
    "clip.has_vision_encoder": True,
}


def refuses(path, message):
    from doubleweave.sources import load

    with pytest.raises(SourceError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_nothing_honours_is_refused_by_its_name(tmp_path, key):
    path = write(tmp_path / "a.gguf", module_of(), keys={key: REFUSED[key]})
    refuses(path, key.replace(".", r"\."))


def test_a_window_of_qwen2_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", module_of("qwen2"), "qwen2", {"attention.sliding_window": 16})
    refuses(path, r"qwen2\.attention\.sliding_window 16")


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_count": 0},
        {"attention.causal": True},
        {"logit_scale": 1.0},
        {"tensor_data_layout": "Meta AI original pth"},
        {"attention.head_count_kv": [2, 2]},
        {"rope.scaling.finetuned": True},
    ],
)
def test_values_that_change_nothing_are_taken(tmp_path, keys):
    from doubleweave.sources import load

    wanted = module_of()
    model = load(write(tmp_path / "a.gguf", wanted, keys=keys))
    assert torch.equal(gguf_files.logits(model.module), gguf_files.logits(wanted))


# Tensors


def test_a_tensor_without_a_weight_is_refused_by_its_name(tmp_path):
    extra = {"blk.0.attn_sinks.weight": np.zeros(HEADS, np.float32)}
    refuses(
        write(tmp_path / "a.gguf", module_of(), tensors=extra), r"found the tensor blk\.0\.attn_sinks\.weight"
    )


@pytest.mark.parametrize(
    ("tensor", "weight"),
    [
        ("blk.1.ffn_up.weight", r"model\.layers\.1\.mlp\.up_proj\.weight"),
        ("token_embd.weight", r"model\.embed_tokens\.weight"),
        ("output_norm.weight", r"model\.norm\.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, tensor, weight):
    refuses(write(tmp_path / "a.gguf", module_of(), tensors={tensor: None}), f"has no tensors for {weight}")


def test_a_tensor_of_another_shape_is_named(tmp_path):
    odd = {"blk.0.ffn_up.weight": np.zeros((95, HIDDEN), np.float32)}
    refuses(
        write(tmp_path / "a.gguf", module_of(), tensors=odd),
        r"up_proj\.weight has the shape \[95, 64\], expected",
    )


@pytest.mark.parametrize("missing", FACTORS)
def test_longrope_needs_both_tensors(tmp_path, missing):
    found = {name: value for name, value in FACTORS.items() if name != missing}
    path = write(tmp_path / "a.gguf", module_of("phi3"), "phi3", LONGROPE, found)
    refuses(path, rf"rope\.scaling\.type 'longrope' without the tensor {missing.replace('.', chr(92) + '.')}")


def test_rope_freqs_of_another_size_are_refused(tmp_path):
    odd = {"rope_freqs.weight": np.ones(3, np.float32)}
    refuses(
        write(tmp_path / "a.gguf", module_of(), tensors=odd),
        r"found rope_freqs\.weight with 3 factors, expected 8",
    )


# Parts


def save_parts(folder, module, count=3, total=None):
    """A file for each part; the first has the keys, as gguf-split writes them."""
    tensors = list(gguf_files.tensors_of(module, "llama").items())
    paths = []
    for number in range(count):
        split = {"split.no": number, "split.count": count, "split.tensors.count": total or len(tensors)}
        keys = {**gguf_files.keys_of(module, "llama"), **split} if number == 0 else split
        part = dict(tensors[number::count])
        path = folder / f"tiny-{number + 1:05}-of-{count:05}.gguf"
        paths.append(gguf_files.write_tensors(path, "llama", keys, part))
    return paths


@pytest.mark.parametrize("stays_in_files", [False, True])
@pytest.mark.parametrize("opened", [0, 1, 2])
def test_all_parts_are_read_whichever_is_named(tmp_path, monkeypatch, opened, stays_in_files):
    from doubleweave.sources import load, streamed_module

    monkeypatch.setattr(streamed_module, "LEAST_BYTES", 0 if stays_in_files else 1 << 40)
    monkeypatch.setattr(streamed_module, "_SMALL_BYTES", 0)
    wanted = module_of()
    paths = save_parts(tmp_path, wanted)
    model = load(paths[opened])
    assert model.name == "tiny"
    assert torch.equal(gguf_files.logits(model.module), gguf_files.logits(wanted))
    assert model.audit() == ""


def test_parts_that_are_not_there_are_named(tmp_path):
    paths = save_parts(tmp_path, module_of())
    paths[1].unlink()
    refuses(paths[0], r"one of 3 parts \(split\.count\), but tiny-00002-of-00003\.gguf is not beside it")


def test_a_part_under_another_name_is_refused(tmp_path):
    paths = save_parts(tmp_path, module_of())
    refuses(paths[0].rename(tmp_path / "tiny.gguf"), r"split\.count.*-00001-of-00003\.gguf")


def test_parts_of_other_models_are_refused(tmp_path):
    paths = save_parts(tmp_path, module_of())
    paths[1].write_bytes(paths[2].read_bytes())
    refuses(paths[0], r"found split\.no 2 and split\.count 3, expected 1 and 3")
    (tmp_path / "other").mkdir()
    refuses(save_parts(tmp_path / "other", module_of(), total=LAYERS)[0], r"\(split\.tensors\.count\)")
