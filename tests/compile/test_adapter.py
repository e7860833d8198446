"""A LoRA adapter is merged when it is named, and never left out without a word."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import toys
from doubleweave.errors import PolicyError, SourceError

pytestmark = pytest.mark.usefixtures("lowered_once")

pytest.importorskip("peft")
PREFIX = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toys.save_hugging_face(tmp_path_factory.mktemp("toy"))


def save_adapter(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "base_model_name_or_path": "toy/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora(module="1.self_attn.q_proj", rows=toys.HIDDEN, columns=toys.HIDDEN):
    torch.manual_seed(7)
    name = f"{PREFIX}.{module}" if module[0].isdigit() else f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.randn(4, columns), f"{name}.lora_B.weight": torch.randn(rows, 4)}


def refuses(source, message, **options):
    from doubleweave.sources import load

    with pytest.raises(SourceError, match=message) as error:
        load(source, **options)
    assert "\n" not in str(error.value)


def test_the_adapter_is_in_the_weights(base, tmp_path):
    from doubleweave.sources import load

    tensors = lora()
    low, high = tensors.values()
    model = load(base, adapter=save_adapter(tmp_path / "adapter", tensors))
    wanted = toys.module().state_dict()
    wanted["model.layers.1.self_attn.q_proj.weight"] += 8 / 4 * high @ low
    found = model.module.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    assert not model.module.training
    assert model.audit() == ""


def test_an_adapter_of_the_head_leaves_a_tied_embedding_alone(tmp_path):
    from doubleweave.sources import load

    built = toys.module(tied=True)
    built.save_pretrained(tmp_path / "base")
    tensors = lora("lm_head", rows=toys.VOCAB_SIZE)
    low, high = tensors.values()
    changes = {"target_modules": ["lm_head"], "layers_to_transform": None}
    model = load(tmp_path / "base", adapter=save_adapter(tmp_path / "adapter", tensors, **changes)).module
    embedding = built.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.allclose(model.lm_head.weight, embedding + 2 * high @ low, atol=1e-5)


def test_an_adapter_beside_its_model_is_merged_only_when_it_is_named(base, tmp_path):
    from doubleweave.sources import load

    both = shutil.copytree(base, tmp_path / "both")
    save_adapter(both, lora())
    refuses(both, r"found a model with an adapter beside it .*give --adapter .*both to merge it, or remove")
    found = load(both, adapter=both).module.model.layers[1].self_attn.q_proj.weight
    assert not torch.allclose(found, toys.module().model.layers[1].self_attn.q_proj.weight)


def test_an_adapter_alone(base, tmp_path):
    alone = save_adapter(tmp_path / "alone", lora())
    refuses(
        alone,
        r"it is an adapter of toy/base, without that model: give the model's folder as SOURCE, and --ada",
    )


def test_what_is_no_adapter_of_the_model(base, tmp_path):
    refuses(base, "adapter: found no adapter_config.json in .*expected the folder", adapter=tmp_path)
    prompts = save_adapter(tmp_path / "prompts", {}, peft_type="PREFIX_TUNING")
    refuses(base, "of the type PREFIX_TUNING, which cannot be merged", adapter=prompts)
    other = save_adapter(tmp_path / "other", lora(columns=32))
    refuses(base, "adapter: peft cannot put .* on the model", adapter=other)
    more = save_adapter(tmp_path / "more", lora() | lora("2.self_attn.q_proj"))
    refuses(base, r"2 of the 4 tensors in .* have no place in the model: .*layers\.2\.", adapter=more)
    fewer = save_adapter(tmp_path / "fewer", lora(), layers_to_transform=[1, 2])
    refuses(base, r"2 tensors that adapter_config.json promises are not in", adapter=fewer)
    (other / "adapter_model.safetensors").unlink()
    refuses(base, "found none of adapter_model.safetensors", adapter=other)


def test_without_peft(base, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    adapter = save_adapter(tmp_path / "adapter", lora())
    refuses(
        base,
        r"needs peft, which is not installed; run: pip install 'doubleweave\[adapter\]'",
        adapter=adapter,
    )


def test_options_of_folders_with_other_sources(tmp_path):
    from doubleweave.sources import load

    (tmp_path / "toy.gguf").touch()
    for options in ({"adapter": tmp_path}, {"trust_remote_code": True}):
        with pytest.raises(PolicyError, match=f"{next(iter(options))}: is an option of Hugging Face folders"):
            load(tmp_path / "toy.gguf", **options)


def test_the_command_line_merges_an_adapter(cli, base, tmp_path):
    import doubleweave as dw
    from doubleweave.sources import load

    adapter = save_adapter(tmp_path / "adapter", lora())
    argv = ("compile", base, "--adapter", adapter, "-o", tmp_path / "out", "--quantize", "none", "--no-check")
    code, _, err = cli(*argv)
    assert (code, err) == (0, "")
    found = toys.greedy(dw.open(tmp_path / "out").session(), [3, 1, 4, 1, 5], 12)
    assert found == toys.greedy_in_torch(load(base, adapter=adapter).module, [3, 1, 4, 1, 5], 12)


def test_an_adapter_for_a_loaded_model(tmp_path):
    import doubleweave as dw

    with pytest.raises(PolicyError, match="adapter: is an option of a source that is loaded here"):
        dw.compile_llm(toys.model(), tmp_path / "out", adapter=tmp_path)
