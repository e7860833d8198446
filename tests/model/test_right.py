"""The real model, compiled without quantization, against Hugging Face in eager float32.

RIGHT=all decodes all tokens in every shape and schedule.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from functools import cache, partial
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
# A single token is one chunk, whose tasks wait for one another: no schedule changes their order, and decoding in the
# shape with one method a segment shows what it shows in the other.
NUM_TOKENS_OF_OTHERS = NUM_TOKENS if os.environ.get("RIGHT") == "all" else 8
LONGEST = PROMPTS[-1]["token_ids"]
LENGTHS = (1, 127, 128, 129, 3 * 128 + 17)
CASES = list(itertools.product(("bounded", "static"), ("sequential", "out_of_order", "wavefront")))


@pytest.fixture(scope="module")
def model() -> dw.models.model.Model:  # type: ignore[name-defined]
    return load("smollm2")


@pytest.fixture(scope="module")
def program(model, made_once):  # type: ignore[no-untyped-def]
    """`program(shape)` in float32, compiled when it is first asked for."""

    @cache
    def opened(shape: str) -> dw.Program:
        # These tests hold it against transformers themselves, and the README's is compiled with the check.
        compiled = partial(dw.compile_llm, model, quantize="none", shape=shape, check=False)
        return dw.open(made_once(f"smollm2_{shape}", compiled))  # type: ignore[return-value]

    return opened


@pytest.fixture(scope="module")
def following(model, made_once):  # type: ignore[no-untyped-def]
    """`following(prompt, tokens)`: what transformers give behind the prompt, and behind each of the tokens that follow.

    That is the logits behind the prompt, and all the most likely next tokens, from one run over all of them. Tokens
    that are equal to the next ones are those that transformers would choose one after the other.
    """

    def found(prompt: list[int], tokens: list[int]) -> tuple[np.ndarray, list[int]]:
        given = [*prompt, *tokens]

        def make(path: Path) -> None:
            with torch.no_grad():
                ids = torch.tensor([given])
                logits = model.module(input_ids=ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits[
                    0
                ]
            np.savez(path, logits=logits[0], tokens=logits.argmax(-1))

        digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()
        kept = np.load(made_once(f"smollm2_{digest}.npz", make))
        return kept["logits"], kept["tokens"].tolist()

    return found


@pytest.mark.parametrize(("shape", "schedule"), CASES)
def test_same_greedy_tokens_and_logits(program, following, shape: str, schedule: str) -> None:  # type: ignore[no-untyped-def]
    session = program(shape).session(schedule)
    num_tokens = NUM_TOKENS if (shape, schedule) == CASES[0] else NUM_TOKENS_OF_OTHERS
    for prompt in PROMPTS:
        session.reset()
        found = session.append(prompt["token_ids"])
        greedy = [int(found.argmax())]
        while len(greedy) < num_tokens:
            greedy.append(int(session.append([greedy[-1]]).argmax()))
        logits, tokens = following(prompt["token_ids"], greedy[:-1])
        assert np.abs(found - logits).max() / np.abs(logits).max() < 1e-4, prompt["name"]
        assert greedy == tokens, prompt["name"]


@pytest.fixture(scope="module")
def token_by_token(program, made_once):  # type: ignore[no-untyped-def]
    """`token_by_token(shape)`: the logits behind each of LENGTHS tokens, appended one by one."""

    @cache
    def logits(shape: str) -> np.ndarray:
        def make(path: Path) -> None:
            session, found = program(shape).session("sequential"), []
            for token in LONGEST[: LENGTHS[-1]]:
                last = session.append([token])
                if session.length in LENGTHS:
                    found.append(last)
            np.save(path, found)

        return np.load(made_once(f"smollm2_{shape}_token_by_token.npy", make))  # type: ignore[no-any-return]

    return logits


@pytest.mark.parametrize(("shape", "schedule"), CASES)
def test_prompt_lengths_agree_with_token_by_token(program, token_by_token, shape: str, schedule: str) -> None:  # type: ignore[no-untyped-def]
    whole = program(shape).session(schedule)
    for length, logits in zip(LENGTHS, token_by_token(shape), strict=True):
        whole.reset()
        found = whole.append(LONGEST[:length])
        assert np.abs(found - logits).max() / np.abs(logits).max() < 1e-4


def perplexity(program: dw.Program) -> float:
    return score(program, program.session(), (DATA / "essay.txt").read_text()).perplexity


@pytest.fixture(scope="module")
def full_perplexity(program, made_once) -> float:  # type: ignore[no-untyped-def]
    """Of the bounded program in float32."""
    path = made_once(
        "smollm2_perplexity.txt", lambda path: path.write_text(repr(perplexity(program("bounded"))))
    )
    return float(path.read_text())


def test_perplexity_of_8_bit_weights(full_perplexity, readme_folder) -> None:  # type: ignore[no-untyped-def]
    program = dw.open(readme_folder / "programs" / "smollm2")
    assert program.manifest.model.quantize == "8da8w"
    quantized = perplexity(program)
    print(
        f"perplexity: float32 {full_perplexity:.4f}, 8da8w {quantized:.4f} ({quantized / full_perplexity - 1:+.2%})"
    )
    assert quantized <= 1.035 * full_perplexity


def test_perplexity_agrees_with_transformers(program, full_perplexity, model) -> None:  # type: ignore[no-untyped-def]
    text = (DATA / "essay.txt").read_text()
    ids = torch.tensor([program("bounded").text.encode_raw(text)])
    with torch.no_grad():
        logits = model.module(input_ids=ids, use_cache=False).logits[0, :-1]
    reference = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item()
    assert full_perplexity == pytest.approx(reference, rel=1e-4)
