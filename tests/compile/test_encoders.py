"""Encoders beside a language model in one program: right against transformers, shown, and refused where they misfit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import architectures
import doubleweave as dw
import toys
from doubleweave.check import module as module_check
from doubleweave.errors import CheckError, InputError, PolicyError
from doubleweave.ir import manifest
from doubleweave.sources.hugging_face import from_module
from native_runner import needs_runner, report

EXAMPLE = Path(__file__).parents[2] / "examples" / "vision.py"
PROMPT = [1, 17, 99, *[250] * 16, 5, 203, 44, 8]


@pytest.fixture(scope="module")
def vision() -> Any:
    """examples/vision.py, imported."""
    spec = importlib.util.spec_from_file_location("vision", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def whole(vision: Any) -> Any:
    return vision.tiny_llava()


@pytest.fixture(scope="module")
def seeing(vision: Any, whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return vision.compile_both(whole, tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def image() -> Any:
    return torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def off(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_logits_are_those_of_the_whole_model(whole: Any, seeing: Any, image: Any) -> None:
    """In front of the image, in the middle of it, behind it, and of every token of the text that follows."""
    with torch.no_grad():
        wanted = whole(input_ids=torch.tensor([PROMPT]), pixel_values=image).logits[0].numpy()
    session = seeing.session()
    rows = seeing.methods["vision"](image.numpy())
    assert rows.shape == (16, 64)
    assert off(session.append(PROMPT[:3]), wanted[2]) < 1e-5
    assert off(session.append_embeddings(rows[:7]), wanted[9]) < 1e-5
    assert off(session.append_embeddings(rows[7:]), wanted[18]) < 1e-5
    assert off(session.score(PROMPT[19:]), wanted[19:]) < 1e-5


def test_an_answer_is_that_of_the_whole_model(vision: Any, whole: Any, seeing: Any, image: Any) -> None:
    """And another one where the image is another."""
    answers = set()
    for pixels in (image, -image):
        with torch.no_grad():
            wanted = whole.generate(
                torch.tensor([PROMPT]), pixel_values=pixels, max_new_tokens=24, do_sample=False
            )
        found = vision.answer(seeing, PROMPT, pixels.numpy())
        ends = seeing.model.eos_token_ids
        assert found == tuple(token for token in wanted[0, len(PROMPT) :].tolist() if token not in ends)
        answers.add(found)
    assert len(answers) == 2


def test_inspect_shows_the_encoder(cli: Any, seeing: Any) -> None:
    code, out, _ = cli("inspect", seeing.folder, "--json")
    assert code == 0
    signature = "vision(pixel_values: float32[1, 3, 56, 56]) -> float32[16, 64]"
    assert signature in out.splitlines()
    found = json.loads(out.splitlines()[-1])
    assert [function["name"] for function in found["functions"]] == ["vision"]
    assert {"embed_tokens", "vision.glue_0"} <= {segment["name"] for segment in found["segments"]}
    assert "model.layers" not in str(seeing.methods)
    assert repr(seeing.methods["vision"]) == f"<method {signature}>"


@needs_runner
def test_the_native_runner_runs_the_text_of_such_a_program(seeing: Any, tmp_path: Path) -> None:
    ids = [token for token in PROMPT if token != 250]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    found = report(seeing.folder, "--token-ids", tmp_path / "ids.json", "-n", 12)
    assert tuple(found["token_ids"]) == seeing.generate(ids, 12).token_ids


class Ears(nn.Module):
    """Frames float32 [n, 4, 10] to rows [4 n, hidden]."""

    def __init__(self, width: int = toys.HIDDEN) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.mix = nn.Sequential(nn.Linear(10, 24), nn.GELU())
        self.project = nn.Linear(24, width)

    def forward(self, frames: Any) -> Any:
        rows = self.project(self.mix(frames).flatten(0, 1))
        return rows * 0.2


FRAMES = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The toy in 8 bits, with an encoder of any number of frames and a nested module by itself, and another one."""
    number = Dim("n", min=1, max=16)
    folder = tmp_path_factory.mktemp("hearing") / "program"
    ears = dw.Encoder(
        Ears(), (FRAMES,), None, {"frames": {0: number}}, {"mix": dw.Dynamic({"input": {0: number}})}
    )
    dw.compile_llm(
        toys.model(),
        folder,
        quantize="8da8w",
        chunk=(32,),
        encoders={
            "ears": ears,
            "nose": dw.Encoder(nn.Linear(5, toys.HIDDEN), (), {"input": torch.ones(2, 5)}),
        },
    )
    return dw.open(folder)


def test_encoders_of_any_size_and_policy(hearing: Any) -> None:
    assert {"ears", "ears.mix", "nose"} <= set(hearing.methods)
    with torch.no_grad():
        for n in (1, 3, 16):
            frames = torch.randn(n, 4, 10)
            assert off(hearing.methods["ears"](frames).numpy(), Ears()(frames).numpy()) < 1e-5
    assert hearing.methods["ears.mix"](np.ones((2, 4, 10), np.float32)).shape == (2, 4, 24)
    assert [function.name for function in manifest.read(hearing.folder).split.functions] == [
        *("", "ears", "ears.mix", "nose")
    ]


def test_quantized_models_take_rows(hearing: Any) -> None:
    """The rows of tokens are what the lookup gives: with them logits are the same bits."""
    ids = np.arange(40) % 250
    rows = hearing.methods["embed_tokens"](ids[None, :32])[0]
    session = hearing.session("sequential")
    expected = session.append(ids[:32])
    session.reset()
    assert np.array_equal(session.append_embeddings(rows), expected)
    heard = session.append_embeddings(hearing.methods["ears"](FRAMES.numpy()))
    assert session.length == 44
    assert not np.array_equal(heard, expected)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x + self.calls


class Two(nn.Module):
    def forward(self, x: Any) -> Any:
        return x, x


def x(*sizes: int, dtype: Any = torch.float32) -> Any:
    return (torch.ones(*sizes, dtype=dtype),)


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ([1], "encoders: found a list, expected a dict of doubleweave.Encoder by name"),
        ({"a b": 1}, "encoders: found the name 'a b', expected one such as 'vision'"),
        ({"ears": Ears()}, "encoder 'ears': found a Ears, expected a doubleweave.Encoder"),
        (
            {"ears": dw.Encoder(print, ())},
            "encoder 'ears': module: found a builtin_function_or_method, expected a",
        ),
        ({"ears": dw.Encoder(Ears(), FRAMES)}, "encoder 'ears': args: found a Tensor, expected a tuple"),
        (
            {"ears": dw.Encoder(Ears(), (FRAMES,), policy={"mixed": dw.Dynamic()})},
            "encoder 'ears': policy: .*'mixed'",
        ),
        (
            {"ears": dw.Encoder(Ears(48), (FRAMES,))},
            r"encoder 'ears': gives float32\[12, 48\], expected one float32 tensor of rows of 64 numbers",
        ),
        ({"ears": dw.Encoder(Two(), x(2, 64))}, r"gives float32\[2, 64\], float32\[2, 64\], expected one"),
        (
            {"ears": dw.Encoder(nn.Identity(), x(2, 64, dtype=torch.int64))},
            r"gives int64\[2, 64\], expected one",
        ),
        (
            {"count": dw.Encoder(Counts(), x(64))},
            "encoder 'count': its forward changes calls, expected a module that",
        ),
        (
            {"lm_head": dw.Encoder(Ears(), (FRAMES,))},
            "encoder 'lm_head': is the name of the model's segment lm_head; choose another",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_encoders_that_do_not_fit_are_refused(encoders: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=message):
        dw.compile_llm(toys.model(num_layers=1), tmp_path / "out", quantize="none", encoders=encoders)
    assert not (tmp_path / "out").exists()


def test_a_model_that_reads_ids_elsewhere_takes_no_encoder(tmp_path: Path) -> None:
    """Gemma 4 has embeddings by layer, which are looked up by the ids that rows do not have."""
    model = from_module(architectures.tiny_model("gemma4_text"), "gemma4", None)
    ears = dw.Encoder(Ears(), (FRAMES,))
    message = (
        "encoders: the model reads token ids in block_0 as well as where it looks up embeddings.*without them"
    )
    with pytest.raises(PolicyError, match=message):
        dw.compile_llm(model, tmp_path / "out", quantize="none", max_context=64, encoders={"ears": ears})


def test_an_encoder_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = module_check.run
    monkeypatch.setattr(module_check, "run", lambda *call: [result + 0.1 for result in ran(*call)])
    with pytest.raises(CheckError, match="ears: result 0 of the program is other than the module's"):
        dw.compile_llm(
            toys.model(num_layers=1),
            tmp_path / "out",
            quantize="none",
            encoders={"ears": dw.Encoder(Ears(), (FRAMES,))},
        )
    assert not (tmp_path / "out").exists()


# Gemma scales what it looked up inside of its graph; LFM2 keeps the states of convolutions.
@pytest.mark.parametrize("name", ["gemma2", "lfm2"])
def test_rows_are_what_transformers_takes_as_inputs_embeds(name: str, tmp_path: Path) -> None:
    module = architectures.tiny_model(name)
    dw.compile_llm(
        from_module(module, name, None), tmp_path / "out", quantize="none", max_context=128, check=False
    )
    program = dw.open(tmp_path / "out")
    assert isinstance(program, dw.Program)
    rows = torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(4)) * 0.3
    ids = torch.arange(3, 33)[None]
    with torch.no_grad():
        mixed = torch.cat((rows[:, :40], module.get_input_embeddings()(ids), rows[:, 40:]), 1)
        wanted = module(inputs_embeds=mixed, use_cache=False).logits[0].numpy()
    session = program.session()
    for _ in range(2):
        assert off(session.append_embeddings(rows[0, :40]), wanted[39]) < 1e-4
        kept = session.snapshot()
        assert off(session.append(ids[0].numpy()), wanted[69]) < 1e-4
        assert off(session.append_embeddings(rows[0, 40:41]), wanted[70]) < 1e-4
        session.truncate(kept)
        assert off(session.append(ids[0].numpy()), wanted[69]) < 1e-4
        assert off(session.append_embeddings(rows[0, 40:]), wanted[89]) < 1e-4
        with pytest.raises(InputError, match="NaN or infinity"):
            session.append_embeddings(rows[0] * float("nan"))
        session.reset()


def test_a_model_whose_image_tokens_see_each_other_takes_no_encoder(tmp_path: Path) -> None:
    """Gemma 3 hides later tokens from those of a text, but not an image's own from each other."""
    architectures.tiny_model("gemma3").save_pretrained(tmp_path / "gemma3")
    message = (
        "encoders: Gemma3ForConditionalGeneration takes token_type_ids: the model does more with an image's"
    )
    with pytest.raises(PolicyError, match=message):
        dw.compile_llm(
            tmp_path / "gemma3",
            tmp_path / "out",
            quantize="none",
            encoders={"ears": dw.Encoder(Ears(), (FRAMES,))},
        )
