"""The check that ends the compile of a language model: what it compares, and the faults that it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import doubleweave as dw
import toys
from doubleweave.check import places
from doubleweave.compiler.graph import export_llm, rotary_lengths
from doubleweave.compiler.graph.states import States
from doubleweave.compiler.lower import lower as lower_module
from doubleweave.compiler.split import llm_rows
from doubleweave.sources.hugging_face import from_module

pytestmark = pytest.mark.usefixtures("lowered_once")

SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return from_module(module, "toy", None)


def compiled(model: Any, out: Path, **options: Any) -> Any:
    return dw.compile_llm(model, out, **{"quantize": "none", **options})


def test_a_float_program_is_held_against_the_source(tmp_path: Path) -> None:
    check = compiled(toys.model(), tmp_path / "out").check
    assert (check.ran, check.reason) == ("program", "")
    assert check.num_tokens == toys.MAX_CONTEXT  # two chunks and a remainder would not fit
    assert 0 < check.source_off < 5e-5
    assert check.segment_noise is check.logits_noise is check.top1 is None
    assert dw.open(tmp_path / "out").manifest.check == check


def check_of(folder: Path) -> Any:
    """What compiling a program wrote of its check."""
    return dw.open(folder).manifest.check


@pytest.mark.parametrize("recipe", ["8da8w", "8da4w"])
def test_a_quantized_program_is_held_against_its_split(recipe: str, request: pytest.FixtureRequest) -> None:
    check = check_of(request.getfixturevalue(f"toy_{recipe}_dir"))
    assert check.source_off < 5e-5
    assert check.segment_noise < 0.05
    assert check.logits_noise < 0.35
    assert check.kl > 0
    assert 0 < check.top1 <= 1


@pytest.mark.parametrize("program", ["toy_static_dir", "static_attention_dir"])
def test_programs_of_fixed_sizes_are_checked_at_each(program: str, request: pytest.FixtureRequest) -> None:
    check = check_of(request.getfixturevalue(program))
    assert check.ran == "program"
    assert check.source_off < 5e-5


def test_sizes_together_may_be_more_than_the_context(tmp_path: Path) -> None:
    options = {"quantize": "8da8w", "shape": "static", "chunk": [1, 8, 16], "max_context": 16}
    check = compiled(toys.model(), tmp_path / "out", **options).check
    assert check.num_tokens == 16
    assert check.segment_noise < 0.05


def test_no_check_is_recorded(tmp_path: Path) -> None:
    assert compiled(toys.model(), tmp_path / "out", check=False).check is None
    assert dw.open(tmp_path / "out").manifest.check is None


def refused(model: Any, out: Path, **options: Any) -> str:
    with pytest.raises(dw.CheckError) as error:
        compiled(model, out, **options)
    assert not out.exists()
    return str(error.value)


def test_rows_that_meet_in_a_convolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ["conv", "full_attention"]
    monkeypatch.setattr(export_llm, "find_states", lambda model: States({}, ()))  # as if it kept none
    model = model_of(transformers.Lfm2Config(**SIZES, layer_types=layers, block_auto_adjust_ff_dim=False))
    with pytest.raises(
        dw.SplitError, match=r"in model\.layers\.0\.conv \(Lfm2ShortConv\) aten\.conv1d is over the rows"
    ):
        compiled(model, tmp_path / "out")
    monkeypatch.setattr(llm_rows, "check_rows", lambda *given: None)
    message = refused(model, tmp_path / "out")
    assert "other logits than the source from position 128 on" in message
    assert "block_0 depends on how the prompt is cut into chunks: rows meet there" in message


def longrope() -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 256,
    }
    return model_of(transformers.LlamaConfig(**SIZES, rope_parameters=rope | factors))


def test_frequencies_that_change_with_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(longrope(), tmp_path / "short", max_context=256).check.source_off < 5e-5
    check = compiled(longrope(), tmp_path / "both").check
    assert check.source_off < 5e-5
    assert check.num_tokens > 256  # by the long ones
    assert check.positions == (2,)  # by the short ones
    monkeypatch.setattr(rotary_lengths, "rotary_border", lambda *given: 0)
    assert "is another function than the model" in refused(longrope(), tmp_path / "out")


def test_a_window_that_is_far_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = 3000
    config = transformers.MistralConfig(**SIZES | {"max_position_embeddings": 4096}, sliding_window=window)
    check = compiled(model_of(config), tmp_path / "out").check
    assert check.num_tokens < window
    assert check.positions == (window - 2,)
    attend = export_llm.attend

    def without_window(q, k, v, parameters, **named):
        return attend(q, k, v, (*parameters[:3], 0, *parameters[4:]), **{**named, "mask": None})

    monkeypatch.setattr(export_llm, "attend", without_window)
    message = refused(model_of(config), tmp_path / "wrong")
    assert f"from position {window} on" in message


def test_weights_of_another_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower_module.lower

    def lower(torch_split: Any, *given: Any) -> Any:
        weights = dict(torch_split.weights)
        weights["block_1"], weights["block_2"] = weights["block_2"], weights["block_1"]
        return right(replace(torch_split, weights=weights), *given)

    monkeypatch.setattr(lower_module, "lower", lower)
    for options in ({}, {"quantize": "8da8w"}, {"shape": "static", "chunk": [1, 16]}):
        message = refused(toys.model(), tmp_path / "out", **options)
        assert "segment block_1" in message or "segment block_2" in message


def test_places() -> None:
    first = places.first_place(128, 8192, [])
    assert first == (0, (128, 128, 43, 1, 1, 1))
    assert places.first_place(128, 8192, [512]).end == 517
    assert places.first_place(128, 100, []).end == 100
    assert [place.start for place in places.far_places(first, 8192, [200, 4096, 8191])] == [4094, 4094]
    assert first.cut((32, 32, 11)).chunks == (32, 32, 11)
    config = transformers.Gemma2Config(sliding_window=1024, max_position_embeddings=8192)
    assert places.lengths_of(config, 8192) == [1024]
