"""LongRoPE: a text that is longer than a border has other frequencies, for all of its tokens.

The truth is the module itself over the whole text, without a cache, and transformers' generate.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from test_check_llm import SIZES as SMALL

import doubleweave as dw
from doubleweave.errors import SplitError
from doubleweave.sources.hugging_face import from_module
from native_runner import needs_runner, report

pytestmark = pytest.mark.usefixtures("lowered_once")

BORDER = 40
IDS = np.random.default_rng(0).integers(1, 256, 100)
FORMS: dict[str, dict[str, Any]] = {
    "bounded": {"chunk": (16,)},
    "static": {"shape": "static", "chunk": (1, 16)},
    "static attention": {"attention": "static", "chunk": (1, 16)},
    "8da8w": {"quantize": "8da8w", "chunk": (16,)},
}


SIZES = SMALL | {"max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}


def model() -> Any:
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": BORDER,
        "short_factor": [1 + i / 10 for i in range(8)],
        "long_factor": [2 + i / 2 for i in range(8)],
    }
    config = transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=BORDER, rope_parameters=scaling
    )
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def source() -> Any:
    return model()


@pytest.fixture(scope="module", params=FORMS)
def program(request: pytest.FixtureRequest, source: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("longrope") / "program"
    options = {"quantize": "none", "max_context": 128, **FORMS[request.param]}
    dw.compile_llm(from_module(source, "phi3", None), folder, **options)
    return dw.open(folder)


def last_row(source: Any, ids: Any) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = source(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return logits[-1]


def holds(program: Any, found: np.ndarray, wanted: np.ndarray) -> None:
    """In 8 bits what is right is closer to the source than the other frequencies are: 0.3 and more."""
    bound = 1e-5 if program.manifest.model.quantize == "none" else 0.15
    assert np.abs(found - wanted).max() < bound * np.abs(wanted).max()


def test_its_frequencies_are_told_apart(source: Any) -> None:
    """Else nothing here could fail: rotary embedding by the short ones gives other logits."""
    long = last_row(source, IDS[: BORDER + 1])
    short = model()
    short.model.rotary_emb.rope_type = "default"
    assert np.abs(last_row(short, IDS[: BORDER + 1]) - long).max() > 0.3 * np.abs(long).max()


def test_a_session_on_both_sides_of_the_border(program: Any, source: Any) -> None:
    assert program.manifest.model.rotary_border == BORDER
    session = program.session()
    holds(program, session.append(IDS[:30]), last_row(source, IDS[:30]))
    holds(program, session.append(IDS[30:60]), last_row(source, IDS[:60]))  # computes the 30 anew
    assert session.length == 60
    holds(program, session.append(IDS[60:61]), last_row(source, IDS[:61]))
    session.truncate(20)  # and back, where the short ones hold again
    for at in range(20, BORDER + 3):
        last = session.append(IDS[at : at + 1])
        if at in (20, BORDER - 1, BORDER, BORDER + 2):
            holds(program, last, last_row(source, IDS[: at + 1]))


def test_a_long_prompt_has_the_long_ones_from_its_first_token(program: Any, source: Any) -> None:
    session = program.session(schedule="wavefront")
    found = session.score(IDS)
    with torch.no_grad():
        wanted = source(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()
    holds(program, found, wanted)


def test_a_text_that_is_expected_to_be_long_computes_nothing_anew(program: Any, source: Any) -> None:
    session = program.session()
    session.expect(60)
    session.append(IDS[:30])
    session.append(IDS[30:59], record=True)
    assert session.recorded.cached == 30
    holds(program, session.append(IDS[59:60]), last_row(source, IDS[:60]))
    session.reset()
    holds(program, session.append(IDS[:30]), last_row(source, IDS[:30]))


def test_greedy_tokens_over_the_border(program: Any, source: Any) -> None:
    prompt = IDS[: BORDER - 5].tolist()
    if program.manifest.model.quantize != "none":
        pytest.skip("in 8 bits random weights choose other tokens than in float32")
    with torch.no_grad():
        made = source.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    wanted = made[0, len(prompt) :].tolist()
    session, found = program.session(), []
    last = session.append(prompt)
    while len(found) < len(wanted):
        found.append(int(last.argmax()))
        last = session.append(found[-1:])
    assert found == wanted


@needs_runner
def test_the_runner_gives_the_same_tokens(program: Any, tmp_path: Path) -> None:
    for length in (BORDER - 5, BORDER + 5):
        (tmp_path / "ids.json").write_text(json.dumps(IDS[:length].tolist()))
        expected = program.generate(IDS[:length].tolist(), max_new_tokens=12)
        found = report(program.folder, "--token-ids", tmp_path / "ids.json", "-n", 12)
        assert tuple(found["token_ids"]) == expected.token_ids


def test_rows_in_the_place_of_tokens(program: Any, source: Any) -> None:
    session = program.session()
    with torch.no_grad():
        rows = source.get_input_embeddings()(torch.from_numpy(IDS)).numpy()
    session.append(IDS[:10])
    session.append_embeddings(rows[10:30])
    holds(program, session.append(IDS[30:60]), last_row(source, IDS[:60]))


def test_a_context_within_the_border_has_one_set(source: Any, tmp_path: Path) -> None:
    dw.compile_llm(
        from_module(source, "phi3", None), tmp_path / "p", quantize="none", max_context=BORDER, chunk=(16,)
    )
    program = dw.open(tmp_path / "p")
    assert program.manifest.model.rotary_border == 0
    holds(program, program.session().append(IDS[:BORDER]), last_row(source, IDS[:BORDER]))


def test_dynamic_scaling_is_refused_behind_its_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    dynamic = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rope_parameters=scaling))
    model = from_module(dynamic.eval(), "llama", None)
    model = replace(model, max_context=1024)
    with pytest.raises(SplitError, match=r"\(dynamic\) .* found a context of 400, expected at most 256"):
        dw.compile_llm(model, tmp_path / "p", quantize="none", max_context=400)
