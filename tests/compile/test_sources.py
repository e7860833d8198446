"""Loading models: a Hugging Face folder and a GGUF file give the toy back; damaged ones say so in a line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import toys
from doubleweave.errors import SourceError

pytestmark = pytest.mark.usefixtures("lowered_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.save_hugging_face(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return toys.save_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf")


def check_is_the_toy(model, tmp_path):
    wanted = toys.module().state_dict()
    found = model.module.state_dict()
    assert set(found) == set(wanted)
    assert all(found[name].dtype == torch.float32 for name in found)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not model.module.training
    assert (model.max_context, model.vocab_size) == (toys.MAX_CONTEXT, toys.VOCAB_SIZE)
    assert model.eos_token_ids == (toys.EOS_ID,)
    assert model.chat_template == toys.CHAT_TEMPLATE
    assert model.special_tokens["eos_token"] == toys.END
    model.save_tokenizer(tmp_path)
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("plain", "né 😀", "<|user|>x<|end|>"):
        ids = saved.encode(text, add_special_tokens=False).ids
        assert ids == toys.tokenizer().encode(text, add_special_tokens=False).ids


def test_hugging_face_folder(folder, tmp_path):
    from doubleweave.sources import load

    model = load(folder)
    assert model.name == folder.name
    check_is_the_toy(model, tmp_path)


def test_gguf_file(gguf_file, tmp_path):
    from doubleweave.sources import load

    model = load(str(gguf_file))
    assert model.name == "toy"
    check_is_the_toy(model, tmp_path)


def refuses(source, message):
    from doubleweave.sources import load

    with pytest.raises(SourceError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_what_is_no_source(tmp_path):
    refuses(tmp_path / "nothing", r"no such file or folder; expected a \.gguf file, a Hugging Face folder")
    (tmp_path / "notes.txt").write_text("x")
    refuses(tmp_path / "notes.txt", r"found a \.txt file, expected a \.gguf file")
    (tmp_path / "plain").write_text("x")
    refuses(tmp_path / "plain", "found a nameless kind of file")
    refuses(tmp_path, r"has no config\.json; expected a Hugging Face model folder")


def test_gguf_of_an_unsupported_architecture(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "nonsense")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses(tmp_path / "odd.gguf", "found architecture 'nonsense', expected one of .*llama")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.5, 0.99])
def test_truncated_gguf(gguf_file, tmp_path, share):
    data = gguf_file.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[: int(share * len(data))])
    refuses(tmp_path / "short.gguf", r"short\.gguf: .*(fetch|transformers)")


def test_gguf_that_is_something_else(tmp_path):
    (tmp_path / "text.gguf").write_text("this is no GGUF file, although its name says so" * 100)
    refuses(tmp_path / "text.gguf", "is not a whole GGUF file")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(folder, tmp_path, share):
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refuses(copy, "copy: (the weights cannot be read|transformers cannot load it)")


@pytest.mark.parametrize(
    "config",
    ["", "{", "[]", "{}", '{"model_type": "nonsense"}', '{"model_type": "llama", "hidden_size": "x"}'],
)
def test_broken_config(folder, tmp_path, config):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "config.json").write_text(config)
    refuses(copy, "copy: (the weights cannot be read|transformers cannot load it)")


def test_missing_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    refuses(copy, "transformers cannot load it")


def test_a_folder_without_a_tokenizer_can_be_loaded(folder, tmp_path):
    from doubleweave.sources import load

    copy = shutil.copytree(folder, tmp_path / "copy")
    for path in copy.glob("*token*"):
        path.unlink()
    assert load(copy).save_tokenizer is None


def test_a_folder_in_shards_compiles_to_the_same_tokens(tmp_path):
    import doubleweave as dw

    toys.save_hugging_face(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors").unlink()
    toys.module().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    dw.compile_llm(tmp_path / "shards", tmp_path / "out", quantize="none")
    found = toys.greedy(dw.open(tmp_path / "out").session(), [3, 1, 4, 1, 5], 16)
    assert found == toys.greedy_in_torch(toys.module(), [3, 1, 4, 1, 5], 16)
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    refuses(tmp_path / "shards", "shards: the weights cannot be read")
    shard.unlink()
    refuses(tmp_path / "shards", "shards: transformers cannot load it: .*model-00002")


def test_a_tokenizer_with_more_tokens_than_the_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    described = json.loads((copy / "tokenizer.json").read_text())
    described["model"]["vocab"] |= {f"more{number}": 300 + number for number in range(30)}
    (copy / "tokenizer.json").write_text(json.dumps(described))
    refuses(copy, "the tokenizer has 286 tokens, but the model has 264; put the model's own there")
