"""Weights that stay in their files: the same model, program and refusals as of a module that is loaded whole."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import architectures
import doubleweave as dw
import toys
from doubleweave.errors import SourceError
from doubleweave.sources import file_weights, load, streamed_module
from doubleweave.sources.file_weights import FileWeight, in_memory, stand_ins
from doubleweave.sources.hugging_face import quiet

pytestmark = pytest.mark.usefixtures("lowered_once")
IDS = torch.arange(3, 40)[None]


@pytest.fixture
def every_weight(monkeypatch):
    """Small models' weights stay in their files as well."""
    monkeypatch.setattr(streamed_module, "LEAST_BYTES", 0)
    monkeypatch.setattr(streamed_module, "_SMALL_BYTES", 0)


def in_files(module):
    return [name for name, weight in module.named_parameters() if isinstance(weight, FileWeight)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models in bfloat16, by architecture, each made once."""
    base = tmp_path_factory.mktemp("folders")

    def folder(name):
        path = base / name
        if not path.exists():
            module = toys.module(tied=True) if name == "tied" else architectures.tiny_model(name)
            module.to(torch.bfloat16).save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("name", ["tied", "gemma2", "lfm2", "mamba", "gpt2", "opt"])
def test_logits_are_those_of_the_whole_module(folders, name, request):
    with torch.no_grad():
        wanted = load(folders(name)).module(IDS, use_cache=False).logits
        request.getfixturevalue("every_weight")
        streamed = load(folders(name))
        found = streamed.module(IDS, use_cache=False).logits
    assert len(in_files(streamed.module)) == len(list(streamed.module.parameters()))
    assert type(found) is torch.Tensor
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert streamed.audit() == ""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tied", {"quantize": "8da8w"}),
        ("qwen3", {"quantize": "8da4w", "shape": "static", "chunk": (1, 8), "table": "int4"}),
        ("cohere", {"quantize": "none"}),  # its weights are turned
        ("gpt2", {"quantize": "8da8w"}),  # transposed, and cut into q, k and v
        ("mixtral", {"quantize": "8da8w"}),  # its experts are stacked and joined
        ("olmoe", {"quantize": "8da4w", "table": "bfloat16"}),
    ],
)
def test_programs_are_the_same_byte_for_byte(folders, name, options, tmp_path, request):
    dw.compile_llm(folders(name), tmp_path / "whole", max_context=64, check=False, **options)
    request.getfixturevalue("every_weight")
    checked = dw.compile_llm(folders(name), tmp_path / "streamed", max_context=64, **options)
    whole, streamed = ((tmp_path / kind / "program.pte").read_bytes() for kind in ("whole", "streamed"))
    assert whole == streamed
    assert checked.check is not None
    assert checked.check.source_off < 1e-5


@pytest.mark.usefixtures("every_weight")
class TestWhatIsLoadedWhole:
    """What transformers computes or chooses on loading is its to load."""

    def test_an_expert_that_is_missing(self, folders, tmp_path):
        folder = shutil.copytree(folders("mixtral"), tmp_path / "one less")
        tensors = load_file(folder / "model.safetensors")
        lost = next(name for name in sorted(tensors) if ".experts.1.w2." in name)
        del tensors[lost]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match="experts"):
            load(folder)

    def test_a_weight_that_is_saved_twice(self, folders, tmp_path):
        folder = shutil.copytree(folders("tied"), tmp_path / "twice")
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert not in_files(load(folder).module)

    @pytest.mark.parametrize("change", ["drop", "add", "shape"])
    def test_what_does_not_fit_is_refused_as_ever(self, folders, tmp_path, change):
        folder = shutil.copytree(folders("qwen3"), tmp_path / change)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        if change == "drop":
            del tensors[name]
        elif change == "add":
            tensors["model.layers.0.mlp.other.weight"] = tensors[name].clone()
        else:
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match="other" if change == "add" else name):
            load(folder)

    def test_a_module_that_computes_with_its_parameters(self, folders, monkeypatch):
        from transformers import Qwen3ForCausalLM

        make = Qwen3ForCausalLM.__init__

        def making(self, config):
            make(self, config)
            # transformers makes it on the meta device, buffers and all, and computes what it needs later.
            assert self.model.norm.weight.device == torch.get_default_device()

        monkeypatch.setattr(Qwen3ForCausalLM, "__init__", making)
        assert not in_files(load(folders("qwen3")).module)


def test_small_models_are_loaded_whole(folders):
    assert not in_files(load(folders("qwen3")).module)


@pytest.fixture
def weight(tmp_path, monkeypatch):
    """(A file weight [7, 4], its numbers in float32)."""
    from contextlib import contextmanager

    numbers = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    monkeypatch.setattr(file_weights, "FEATURES", 3)

    @contextmanager
    def opened():
        yield numbers

    return FileWeight(opened, (7, 4)), numbers.float()


def test_nobody_writes_into_it(weight):
    held, numbers = weight
    for write in (lambda: held.add_(1), lambda: held.copy_(numbers), lambda: held.zero_()):
        with pytest.raises(SourceError, match="a weight that stays in its file cannot be written"):
            write()
    assert torch.equal(in_memory(held), numbers)


def test_operators_read_it(weight):
    held, numbers = weight
    x = torch.randn(2, 4)
    assert held.detach() is held
    assert (held.dtype, held.shape, held.nbytes) == (torch.float32, (7, 4), 7 * 4 * 4)
    assert torch.equal(in_memory(held), numbers)
    assert torch.equal(torch.cat([block.clone() for block in held.blocks(3)]), numbers)
    assert torch.equal(held + 1, numbers + 1)
    assert torch.equal(held[2:5], numbers[2:5])
    assert torch.equal(functional.embedding(torch.tensor([[6, 0]]), held), numbers[[6, 0]][None])
    torch.testing.assert_close(functional.linear(x, held), x @ numbers.T)
    torch.testing.assert_close(
        functional.linear(x, held, torch.arange(7.0)), x @ numbers.T + torch.arange(7.0)
    )
    torch.testing.assert_close(x @ held.T, x @ numbers.T)


def test_stand_ins_are_put_back(weight):
    held, _ = weight
    module = torch.nn.Linear(4, 7, bias=False)
    module.weight = torch.nn.Parameter(held, requires_grad=False)
    before = module.weight
    with stand_ins(module) as put_back:
        assert not in_files(module)
        exported = torch.export.export(module, (torch.ones(2, 4),)).module()
    assert module.weight is before or isinstance(module.weight, FileWeight)
    put_back(exported)
    assert in_files(exported) == ["weight"]


def the_same_module(request, folder, **options):
    """Both ways of loading a folder give the same numbers."""
    whole = load(folder, **options)
    request.getfixturevalue("every_weight")
    streamed = load(folder, **options)
    assert not in_files(whole.module)
    assert len(in_files(streamed.module)) == len(list(streamed.module.parameters()))
    wanted, found = whole.module.state_dict(), streamed.module.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(in_memory(found[name]), wanted[name]) for name in wanted)
    assert streamed.audit() == ""
    with torch.no_grad():
        logits = [model.module(IDS, use_cache=False).logits for model in (whole, streamed)]
    assert (logits[1] - logits[0]).abs().max() <= 1e-6 * logits[0].abs().max()
    return streamed


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_quantized_weights_are_made_when_they_are_read(folders, name, tmp_path, request):
    """FP8 with scales of blocks, experts that are stacked on loading among them."""
    folder = shutil.copytree(folders(name), tmp_path / "fp8")
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        is_quantized = tensor.ndim == 2 and "embed" not in key and "lm_head" not in key
        tensors[key] = tensor.to(torch.float8_e4m3fn) if is_quantized else tensor
        if is_quantized:
            blocks = [-(-size // 32) for size in tensor.shape]
            tensors[f"{key}_scale_inv"] = torch.rand(blocks, generator=torch.Generator().manual_seed(1)) + 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (folder / "config.json").write_text(json.dumps(config))
    the_same_module(request, folder)


def test_a_file_of_torch(folders, tmp_path, request):
    folder = shutil.copytree(folders("qwen3"), tmp_path / "torch")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {"state_dict": {f"module.{name}": one for name, one in tensors.items()}}, folder / "pytorch_model.bin"
    )
    the_same_module(request, folder)


def test_the_text_part_of_a_larger_model(folders, request):
    model = the_same_module(request, folders("gemma3"))
    assert type(model.module).__name__ == "Gemma3ForCausalLM"


LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "init_lora_weights": False}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3", {"target_modules": ["q_proj", "down_proj"]}),
        ("tied", {"target_modules": ["v_proj", "lm_head"]}),
        ("tied", {"target_modules": ["embed_tokens", "o_proj"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("opt", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("qwen3", {"target_modules": ["k_proj"], "use_dora": True}),
    ],
)
def test_an_adapter_is_merged_when_a_weight_is_read(folders, tmp_path, request, name, settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    base = load(folders(name)).module
    with torch.no_grad(), quiet():
        made = peft.get_peft_model(base, peft.LoraConfig(**LORA, **settings))
        for key, parameter in made.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.05)
        made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = the_same_module(request, folders(name), adapter=tmp_path / "adapter")
    found, unchanged = model.module.state_dict(), load(folders(name)).module.state_dict()
    assert not all(torch.equal(in_memory(found[key]), in_memory(unchanged[key])) for key in unchanged)


@pytest.mark.usefixtures("every_weight")
def test_an_adapter_with_an_embedding_of_its_own_is_merged_into_a_whole_module(folders, tmp_path):
    from transformers import Qwen3ForCausalLM

    peft = pytest.importorskip("peft")
    with quiet():
        settings = {**LORA, "target_modules": ["q_proj"]}
        whole = Qwen3ForCausalLM.from_pretrained(folders("qwen3"))
        made = peft.get_peft_model(whole, peft.LoraConfig(**settings))
        made.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert not in_files(load(folders("qwen3"), adapter=tmp_path / "adapter").module)
