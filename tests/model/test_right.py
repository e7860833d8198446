"""The real model, compiled without quantization, against Hugging Face in eager float32.

RIGHT=all decodes all tokens in every shape and schedule.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
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


def decoded(session: dw.Session, prompt: list[int], num_tokens: int) -> tuple[np.ndarray, list[int]]:
    """The logits behind the prompt, and the most likely tokens that follow, one after the other."""
    logits = session.append(prompt)
    tokens = [int(logits.argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(session.append([tokens[-1]]).argmax()))
    return logits, tokens


@pytest.fixture(scope="module")
def compared(program, model, made_once):  # type: ignore[no-untyped-def]
    """`compared(number)`: the logits behind a prompt and the tokens that follow, the program's in the first of CASES,
    and transformers' behind the prompt and behind each of the program's tokens, from one run over all of them.

    As far as their tokens are equal, they are those that transformers would choose one after the other.
    """

    def found(number: int) -> Mapping[str, np.ndarray]:
        prompt = PROMPTS[number]["token_ids"]

        def make(path: Path) -> None:
            shape, schedule = CASES[0]
            logits, tokens = decoded(program(shape).session(schedule), prompt, NUM_TOKENS)
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *tokens[:-1]]])
                source = model.module(input_ids=ids, use_cache=False, logits_to_keep=NUM_TOKENS).logits[0]
            np.savez(
                path,
                logits=logits,
                tokens=tokens,
                source_logits=source[0],
                source_tokens=source.argmax(-1),
            )

        return np.load(made_once(f"smollm2_{number}.npz", make))  # type: ignore[no-any-return]

    return found


@pytest.mark.parametrize(("shape", "schedule"), CASES)
def test_same_greedy_tokens_and_logits(program, compared, shape: str, schedule: str) -> None:  # type: ignore[no-untyped-def]
    for number, prompt in enumerate(PROMPTS):
        both = compared(number)
        logits, tokens = both["logits"], both["tokens"].tolist()
        if (shape, schedule) != CASES[0]:
            session = program(shape).session(schedule)
            logits, tokens = decoded(session, prompt["token_ids"], NUM_TOKENS_OF_OTHERS)
        wanted = both["source_logits"]
        assert np.abs(logits - wanted).max() / np.abs(wanted).max() < 1e-4, prompt["name"]
        assert tokens == both["source_tokens"][: len(tokens)].tolist(), prompt["name"]


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
