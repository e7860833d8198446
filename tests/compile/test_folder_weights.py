"""Every weight of a Hugging Face folder comes from its files: what is missing, left over or wrapped, and the audit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import toys
from doubleweave.errors import SourceError

LAYER = "model.layers.1.mlp.up_proj.weight"


def rewrite(folder, change):
    """Put what `change` gives for the folder's weights in their place."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})
    return folder


def described(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def refuses(folder, message):
    from doubleweave.sources import load

    with pytest.raises(SourceError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def loads_the_toy(folder):
    from doubleweave.sources import load

    model = load(folder)
    wanted = toys.module().state_dict()
    found = model.module.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert model.audit() == ""
    return model


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("lost", ["lm_head.weight", LAYER, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_missing(folder, lost):
    refuses(rewrite(folder, without(lost)), f"1 weight is in none of its files: {lost}; fetch")


def test_many_weights_that_are_missing(folder):
    rewrite(
        folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    )
    refuses(folder, r"9 weights are in none of its files: model\.layers\.1\..* and 6 more")


def test_a_tensor_that_is_left_over(folder):
    rewrite(folder, lambda tensors: {**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    refuses(folder, r"1 tensor in its files belong to no weight of llama: .*q_proj\.bias")


def test_fewer_layers_than_the_files_have(folder):
    refuses(described(folder, num_hidden_layers=2), r"9 tensors in its files belong to no weight of llama")


def test_a_weight_of_another_shape(folder):
    rewrite(folder, lambda tensors: {**tensors, LAYER: tensors[LAYER][:-1].clone()})
    refuses(folder, r"1 weight has another shape than config\.json says: .*95 x 64 \(expected 96 x 64\)")


def test_what_follows_from_the_config_may_be_in_the_files(folder):
    rewrite(
        folder,
        lambda tensors: {
            **tensors,
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
            "model.layers.0.self_attn._extra_state": torch.ones(1),
            "model.rotary_emb.cos_cached": torch.ones(4, 8),
            "model.layers.0.self_attn.bias": torch.ones(1, 1, 16, 16),
        },
    )
    loads_the_toy(folder)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"_forward_module.model.{name}",
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_wrapped_names(folder, wrapped):
    rewrite(folder, lambda tensors: {wrapped(name): tensor for name, tensor in tensors.items()})
    loads_the_toy(folder)


def test_a_file_of_torch(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    loads_the_toy(folder)
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "pytorch_model.bin")
    loads_the_toy(folder)
    torch.save(without(LAYER)(tensors), folder / "pytorch_model.bin")
    refuses(folder, f"1 weight is in none of its files: {LAYER}")


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_weights_may_be_saved_once_or_twice(tmp_path, kept):
    from doubleweave.sources import load

    toys.module(tied=True).save_pretrained(tmp_path)
    embedding = toys.module(tied=True).get_input_embeddings().weight.detach()
    names = ("lm_head.weight", "model.embed_tokens.weight")

    def change(tensors):
        plain = without(*names)(tensors)
        return plain | {name: embedding.clone() for name in names if kept in (name, "both")}

    model = load(rewrite(tmp_path, change))
    assert torch.equal(model.module.lm_head.weight, embedding)
    assert model.audit() == ""
    refuses(rewrite(tmp_path, without(*names)), "embed_tokens")


def test_an_index_of_files_that_are_missing(folder):
    (folder / "model.safetensors").unlink()
    toys.module().save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    for shard in shards[1:3]:
        shard.unlink()
    refuses(
        folder, rf"names {len(shards)} files, of which {shards[1].name}, {shards[2].name} are missing; fetch"
    )
    (folder / "model.safetensors.index.json").write_text("{}")
    refuses(folder, r"index\.json: the weights cannot be read: it is no index of weight files")


@pytest.fixture
def sharded(folder):
    """The toy's weights in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index(folder, {name: file for file, part in parts.items() for name in part})
    return folder


def index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_files_that_disagree_with_their_index(sharded):
    loads_the_toy(sharded)
    places = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    index(sharded, places | {LAYER: "a.safetensors" if places[LAYER] == "b.safetensors" else "b.safetensors"})
    refuses(sharded, rf"says that {LAYER} is in ..safetensors, but it is in ..safetensors; fetch the index")
    index(sharded, places | {"model.layers.7.mlp.up_proj.weight": "a.safetensors"})
    refuses(
        sharded, "layers.7.mlp.up_proj.weight is in a.safetensors, but that file has no such tensor; fetch"
    )


def test_a_tensor_in_two_files(sharded):
    both = load_file(sharded / "a.safetensors") | load_file(sharded / "b.safetensors")
    save_file(both, sharded / "b.safetensors", metadata={"format": "pt"})
    refuses(sharded, r"and \d+ more are in a.safetensors and in b.safetensors; keep the files of one version")


@pytest.mark.parametrize("may_stream", [True, False])
def test_weights_in_integers(folder, monkeypatch, may_stream):
    from doubleweave.sources import streamed_module

    monkeypatch.setattr(streamed_module, "LEAST_BYTES", 0 if may_stream else 1 << 40)
    rewrite(folder, lambda tensors: {**tensors, LAYER: (100 * tensors[LAYER]).to(torch.int32)})
    refuses(
        folder, rf"1 weight is saved in integers, .*: {LAYER} \(I32\); expected bfloat16, float16 or float32"
    )


def test_a_dtype_that_nobody_knows(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F31"', 1))
    refuses(folder, "model.safetensors is damaged .*unknown variant `F31`.*; fetch the file again")


def test_the_audit_sees_a_weight_that_was_left_random(folder, monkeypatch):
    from doubleweave.sources import hugging_face, load

    monkeypatch.setattr(hugging_face, "check_loaded", lambda *arguments: None)
    assert LAYER in load(rewrite(folder, without(LAYER))).audit()


def test_the_audit_sees_what_changed_since(folder):
    model = loads_the_toy(folder)
    with torch.no_grad():
        model.module.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    assert (
        model.audit()
        == "model.layers.2.mlp.down_proj.weight: the loaded weight differs from the one in the file"
    )


def test_the_audit_of_experts_that_are_stacked_on_loading(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    from doubleweave.sources import load

    config = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert any("experts.3." in name for name in load_file(tmp_path / "model.safetensors"))
    model = load(tmp_path)
    assert model.audit() == ""
    stacked = next(weight for name, weight in model.module.named_parameters() if "experts" in name)
    with torch.no_grad():
        stacked[1].normal_()
    assert "absolute sum" in model.audit()


def test_a_quantized_folder_is_the_model_of_its_numbers(folder):
    """Each linear is rounded to FP8, and comes out as it was rounded."""
    from doubleweave.sources import load

    wanted = {}

    def change(tensors):
        found = {}
        for name, tensor in tensors.items():
            if "_proj" not in name:
                found[name] = wanted[name] = tensor
                continue
            scale = tensor.abs().max() / 448
            found[name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = scale.reshape(1, 1)
            wanted[name] = found[name].float() * scale
        return found

    rewrite(folder, change)
    described(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    model = load(folder)
    found = model.module.state_dict()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-6) for name in wanted)
    assert model.audit() == ""
    rewrite(folder, without(f"{LAYER}_scale_inv"))
    refuses(folder, "up_proj.weight_scale_inv is in none of its files")
    refuses(described(folder, quantization_config={"quant_method": "hqq"}), "quantized by the method 'hqq'")
