"""What a folder's config may leave out, the folder's own code, and what a tokenizer was saved with."""

from __future__ import annotations

import json

import pytest
import torch

from doubleweave.errors import PolicyError, SourceError


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def save(folder, config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def small(name, **options):
    import transformers

    return getattr(transformers, name)(vocab_size=264, **options)


def test_contexts_by_their_names(tmp_path):
    from doubleweave.sources import load

    mpt = small("MptConfig", d_model=64, n_layers=1, n_heads=4, max_seq_len=77)
    assert load(save(tmp_path / "mpt", mpt)).max_context == 77
    gpt2 = small("GPT2Config", n_embd=64, n_layer=1, n_head=4, n_positions=78, eos_token_id=5, bos_token_id=5)
    model = load(save(tmp_path / "gpt2", gpt2))
    assert (model.max_context, model.eos_token_ids, model.save_tokenizer) == (78, (5,), None)
    assert model.audit() == ""


def test_a_config_without_a_context(tmp_path):
    import doubleweave as dw

    bloom = small("BloomConfig", hidden_size=64, n_layer=1, n_head=4)
    source = save(tmp_path / "bloom", bloom)
    with pytest.raises(
        PolicyError, match="max-context: found none, and the config of bloom does not say"
    ) as error:
        dw.compile_llm(source, tmp_path / "out")
    assert "such as 2048" in str(error.value)
    with pytest.raises(PolicyError, match="max-context: found 0, expected at least 1"):
        dw.compile_llm(source, tmp_path / "out", max_context=0)


def test_what_a_text_config_says(tmp_path):
    from doubleweave.sources.folder_config import end_tokens, max_context_of, vocab_size_of

    class Module:
        config = small("LlamaConfig", max_position_embeddings=99, eos_token_id=[7, 8])
        generation_config = None

    module, config = Module(), Module.config
    module.config = type("Whole", (), {"get_text_config": lambda self, decoder: config})()
    assert max_context_of(module.config) == 99
    assert vocab_size_of(tmp_path, module) == 264
    assert end_tokens(module, None) == (7, 8)


CODE = "open({!r}, 'w').write('ran')\nclass OwnTokenizer: pass\n"


def test_code_of_a_model_does_not_run_unasked(folder, tmp_path):
    from doubleweave.sources import load

    ran = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(str(ran)))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder / "config.json", model_type="own_model", auto_map=code)
    with pytest.raises(
        SourceError, match=r"auto_map wants the folder's own Python code \(own\.py\)"
    ) as error:
        load(folder)
    assert "--trust-remote-code" in str(error.value)
    assert not ran.exists()
    # The code of a model that transformers has as well is not needed.
    change(folder / "config.json", model_type="llama")
    assert load(folder).audit() == ""
    assert not ran.exists()


def test_code_runs_when_it_is_trusted(folder, tmp_path, monkeypatch):
    import transformers.dynamic_module_utils as dynamic
    from transformers.utils import hub

    from doubleweave.sources import load

    for place in (hub, dynamic):
        monkeypatch.setattr(place, "HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    (folder / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_model'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    code = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    change(folder / "config.json", model_type="own_model", auto_map=code)
    model = load(folder, trust_remote_code=True)
    assert type(model.module).__name__ == "OwnModel"
    assert model.audit() == ""


def test_code_of_a_tokenizer_does_not_run_unasked(folder, tmp_path):
    from doubleweave.sources import load

    ran = tmp_path / "ran"
    (folder / "own.py").write_text(CODE.format(str(ran)))
    (folder / "tokenizer.json").unlink()
    code = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=code)
    with pytest.raises(SourceError, match=r"tokenizer_config\.json's auto_map wants .* \(own\.py\)"):
        load(folder)
    assert not ran.exists()


def test_a_tokenizer_that_is_damaged(folder):
    from doubleweave.sources import load

    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        SourceError, match=r"its tokenizer cannot be read .* or remove them to compile without"
    ):
        load(folder)


def test_truncation_and_padding_do_not_reach_a_prompt(folder, tmp_path):
    from tokenizers import Tokenizer

    from doubleweave.sources import load

    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(max_length=16)
    saved.enable_padding(length=16)
    saved.save(str(folder / "tokenizer.json"))
    load(folder).save_tokenizer(tmp_path)
    found = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert found.truncation is None
    assert found.padding is None
    assert [len(found.encode("x" * count).ids) for count in (2, 100)] == [2, 100]
