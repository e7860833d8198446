"""The text model of a folder that also sees or hears is loaded alone, and gives the whole model's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import architectures
from doubleweave.errors import SourceError
from doubleweave.sources import streamed_module
from doubleweave.sources.file_weights import FileWeight
from doubleweave.sources.hugging_face import load

IDS = torch.arange(3, 40)[None]


def _llava(tie: bool) -> Any:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(**architectures._settings(transformers.LlamaConfig))
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=tie)
    return transformers.LlavaForConditionalGeneration(config).eval()


def _logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("stays_in_files", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: _llava(False), lambda: _llava(True), lambda: architectures.tiny_model("gemma3")]
)
def test_the_text_model_gives_the_logits_of_the_whole(
    make: Any, stays_in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_module, "LEAST_BYTES", 0 if stays_in_files else 1 << 40)
    monkeypatch.setattr(streamed_module, "_SMALL_BYTES", 0)
    whole = make()
    whole.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.module).__name__.endswith("ForCausalLM")
    assert stays_in_files == any(isinstance(one, FileWeight) for one in model.module.parameters())
    assert not any("vision" in name for name, _ in model.module.named_parameters())
    torch.testing.assert_close(_logits(model.module), _logits(whole), rtol=1e-5, atol=1e-5)
    assert model.vocab_size == whole.config.get_text_config().vocab_size
    assert model.audit() == ""


def test_names_of_older_files_are_understood(tmp_path: Path) -> None:
    whole = _llava(False)
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {_old_name(name): tensor for name, tensor in tensors.items()}
    assert "language_model.model.embed_tokens.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(_logits(load(tmp_path).module), _logits(whole), rtol=1e-5, atol=1e-5)


def _old_name(name: str) -> str:
    new, old = "model.language_model.", "language_model.model."
    return (
        name.replace("lm_head", "language_model.lm_head")
        if name.startswith("lm_head")
        else name.replace(new, old)
    )


def test_a_weight_of_the_text_model_that_is_missing_is_refused(tmp_path: Path) -> None:
    _llava(False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_a_model_without_a_text_model_of_its_own_is_refused(tmp_path: Path) -> None:
    transformers.Qwen2VLConfig().save_pretrained(tmp_path)
    with pytest.raises(
        SourceError, match=r"no causal language model of the type 'qwen2_vl'.*\(qwen2_vl_text\)"
    ):
        load(tmp_path)


def test_a_folder_whose_text_model_has_no_embedding_is_refused(tmp_path: Path) -> None:
    _llava(False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llava"
    with pytest.raises(SourceError, match="none of its tensors is the embedding"):
        load(tmp_path)
