"""The real model, compiled without quantization, against Hugging Face in eager float32."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import doubleweave as dw
from doubleweave.measure.perplexity import score
from doubleweave.sources import load

DATA = Path(__file__).parents[1] / "data"
PROMPTS = json.loads((DATA / "prompts.json").read_text())
NUM_TOKENS = 64
CASES = list(itertools.product(("bounded", "static"), ("sequential", "out_of_order", "wavefront")))


@pytest.fixture(scope="module")
def model() -> dw.models.model.Model:  # type: ignore[name-defined]
    return load("smollm2")


@pytest.fixture(scope="module")
def programs(model, made_once) -> dict[str, dw.Program]:  # type: ignore[no-untyped-def]
    options = {
        "bounded": {"quantize": "none", "shape": "bounded"},
        "static": {"quantize": "none", "shape": "static"},
        "8da8w": {"quantize": "8da8w"},
    }
    return {
        name: dw.open(made_once(f"smollm2_{name}", partial(dw.compile_llm, model, **found)))
        for name, found in options.items()
    }


@pytest.fixture(scope="module")
def expected(model, made_once) -> list[tuple[np.ndarray, list[int]]]:  # type: ignore[no-untyped-def]
    """(logits of the prompt's last token, greedy tokens) of each prompt, from transformers."""

    def make(path: Path) -> None:
        logits, tokens = zip(*(generated(model, prompt["token_ids"]) for prompt in PROMPTS), strict=True)
        np.savez(path, logits=logits, tokens=tokens)

    found = np.load(made_once("smollm2_expected.npz", make))
    return list(zip(found["logits"], found["tokens"].tolist(), strict=True))


def generated(model, token_ids: list[int]) -> tuple[np.ndarray, list[int]]:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        out = model.module(input_ids=torch.tensor([token_ids]), use_cache=True)
        logits = out.logits[0, -1].numpy().copy()
        tokens = [int(logits.argmax())]
        while len(tokens) < NUM_TOKENS:
            out = model.module(
                input_ids=torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True
            )
            tokens.append(int(out.logits[0, -1].argmax()))
    return logits, tokens


@pytest.mark.parametrize(("shape", "schedule"), CASES)
def test_same_greedy_tokens_and_logits(programs, expected, shape: str, schedule: str) -> None:  # type: ignore[no-untyped-def]
    session = programs[shape].session(schedule)
    for prompt, (logits, tokens) in zip(PROMPTS, expected, strict=True):
        session.reset()
        found = session.append(prompt["token_ids"])
        assert np.abs(found - logits).max() / np.abs(logits).max() < 1e-4, prompt["name"]
        greedy = [int(found.argmax())]
        while len(greedy) < NUM_TOKENS:
            greedy.append(int(session.append([greedy[-1]]).argmax()))
        assert greedy == tokens, prompt["name"]


@pytest.mark.parametrize(("shape", "schedule"), CASES)
def test_prompt_lengths_agree_with_token_by_token(programs, shape: str, schedule: str) -> None:  # type: ignore[no-untyped-def]
    ids = PROMPTS[-1]["token_ids"]
    one_by_one = programs[shape].session("sequential")
    whole = programs[shape].session(schedule)
    for length in (1, 127, 128, 129, 3 * 128 + 17):
        while one_by_one.length < length:
            logits = one_by_one.append([ids[one_by_one.length]])
        whole.reset()
        found = whole.append(ids[:length])
        assert np.abs(found - logits).max() / np.abs(logits).max() < 1e-4


def perplexity(program: dw.Program) -> float:
    return float(score(program, program.session(), (DATA / "essay.txt").read_text())["perplexity"])


def test_perplexity_of_8_bit_weights(programs) -> None:  # type: ignore[no-untyped-def]
    full = perplexity(programs["bounded"])
    quantized = perplexity(programs["8da8w"])
    print(f"perplexity: float32 {full:.4f}, 8da8w {quantized:.4f} ({quantized / full - 1:+.2%})")
    assert quantized <= 1.035 * full


def test_perplexity_agrees_with_transformers(programs, model) -> None:  # type: ignore[no-untyped-def]
    text = (DATA / "essay.txt").read_text()
    ids = torch.tensor([programs["bounded"].text.encode_raw(text)])
    with torch.no_grad():
        logits = model.module(input_ids=ids, use_cache=False).logits[0, :-1]
    reference = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    found = perplexity(programs["bounded"])
    assert found == pytest.approx(reference, rel=1e-4)
