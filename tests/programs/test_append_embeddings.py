"""Rows of embeddings in the place of token ids: the numbers that transformers gives for inputs_embeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from doubleweave.errors import InputError
from doubleweave.schedule.choice import SCHEDULES

TOKENS = np.random.default_rng(17).integers(0, toys.VOCAB_SIZE, 200)
IS_ROW = np.arange(200) % 23 < 9  # where the sequence has rows that no token has


@pytest.fixture(scope="module")
def rows():
    """float32 [200, hidden]: the embeddings of TOKENS, and others where IS_ROW."""
    import torch

    with torch.no_grad():
        found = toys.module().get_input_embeddings()(torch.from_numpy(TOKENS)).numpy().copy()
    others = np.random.default_rng(18).standard_normal(found.shape).astype(np.float32)
    found[IS_ROW] = others[IS_ROW] * found.std()
    return found


@pytest.fixture(scope="module")
def reference(rows):
    """transformers' logits float32 [200, vocab] of `rows`."""
    import torch

    with torch.no_grad():
        return toys.module()(inputs_embeds=torch.from_numpy(rows)[None]).logits[0].numpy()


def close(found, wanted):
    return np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_tokens", [1, 33, 200])
def test_logits_are_those_of_the_model(program, rows, reference, schedule, num_tokens):
    session = program.session(schedule)
    assert close(session.append_embeddings(rows[:num_tokens]), reference[num_tokens - 1])
    assert session.length == num_tokens


@given(data=st.data())
@settings(max_examples=12)
def test_ids_and_rows_follow_each_other(program, rows, reference, data):
    """Pieces of any length, by ids where the tokens have some and by rows anywhere; some are taken back."""
    session = program.session(data.draw(st.sampled_from(SCHEDULES)))
    while session.length < 100 and (session.length == 0 or data.draw(st.booleans())):
        start = session.length
        end = start + data.draw(st.integers(1, 40))
        if not IS_ROW[start:end].any() and data.draw(st.booleans()):
            logits = session.append(TOKENS[start:end])
        else:
            logits = session.append_embeddings(rows[start:end])
        assert close(logits, reference[end - 1])
        session.truncate(data.draw(st.integers(start + 1, end)))


def test_ids_behind_rows_are_scored(program, rows, reference):
    start = int(np.flatnonzero(IS_ROW)[-1]) + 1
    session = program.session()
    session.append_embeddings(rows[:start])
    assert close(session.score(TOKENS[start:]), reference[start:])


def test_a_recorded_run_has_a_timeline_without_the_lookup(program, rows, reference):
    session = program.session()
    session.append_embeddings(rows[:40])
    assert session.timeline is None
    session.reset()
    assert close(session.append_embeddings(rows[:40], record=True), reference[39])
    assert {event.segment for event in session.timeline.events} >= {"block_0", "attention", "lm_head"}
    assert session.recorded.num_tokens == 40
    by_rows = session.recorded.verified.graph.split.calls
    session.append(TOKENS[:40], record=True)
    by_ids = session.recorded.verified.graph.split.calls
    assert {call.name for call in by_ids} - {call.name for call in by_rows} == {"embed_tokens"}


def test_a_text_is_generated_from_rows(program, rows):
    """With transformers' own greedy tokens, and the numbers of the prompt."""
    import torch

    found = program.generate(inputs_embeds=rows[:70], max_new_tokens=20)
    given = torch.from_numpy(rows[:70])[None]
    ids = []
    module = toys.module()
    with torch.no_grad():
        while (
            len(ids) < 20
            and (token := int(module(inputs_embeds=given).logits[0, -1].argmax())) != toys.EOS_ID
        ):
            ids.append(token)
            given = torch.cat((given, module.get_input_embeddings()(torch.tensor([[token]]))), 1)
    assert found.token_ids == tuple(ids)
    assert found.prompt_tokens == 70
    assert found.text == program.text.decode(ids)


def test_a_text_is_generated_behind_rows(program, rows):
    start = 32  # behind the rows 23 to 31
    session = program.session()
    session.append_embeddings(rows[:start])
    behind = program.generate(TOKENS[start : start + 5], 20, session=session)
    assert behind.token_ids == program.generate(inputs_embeds=rows[: start + 5], max_new_tokens=20).token_ids


def test_tensors_of_other_libraries_and_strides_are_taken(program, rows, reference):
    import torch

    wide = np.repeat(rows[:40], 2, 1)[:, ::2]
    tensor = torch.from_numpy(rows[:40]).requires_grad_()[None]
    for each in (tensor, wide, np.asfortranarray(rows[:40])):
        assert close(program.session().append_embeddings(each), reference[39])


def nan_rows():
    rows = np.zeros((4, toys.HIDDEN), np.float32)
    rows[2, 5] = np.nan
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((3, 65), np.float32), r"found shape \[3, 65\], expected float32 \[T, 64\].*are 64 wide"),
        (np.zeros(64, np.float32), r"found shape \[64\], expected float32 \[T, 64\]"),
        (np.zeros((2, 3, 64), np.float32), r"one sequence; reshape to \[6, 64\]"),
        (np.zeros((1, 1, 3, 64), np.float32), r"found shape \[1, 1, 3, 64\]"),
        (np.zeros((3, 64)), "found dtype float64, expected float32"),
        (np.zeros((3, 64), np.float16), "found dtype float16, expected float32"),
        (np.zeros((0, 64), np.float32), "found no rows, expected at least one"),
        (nan_rows(), "found NaN or infinity in row 2, expected finite numbers"),
        (-np.inf * np.ones((1, 64), np.float32), "found NaN or infinity in row 0"),
        ([[0.0] * 64], r"found a list, expected float32 \[T, 64\]"),
        (
            np.zeros((248, 64), np.float32),
            "context: 9 tokens in the cache and 248 more make 257, expected at most 256",
        ),
    ],
    ids=[
        "width",
        "one row",
        "batch",
        "four axes",
        "float64",
        "float16",
        "none",
        "nan",
        "inf",
        "list",
        "context",
    ],
)
def test_bad_rows_are_refused_and_nothing_is_appended(toy_program, rows, message):
    session = toy_program.session()
    before = session.append(TOKENS[:9])
    with pytest.raises(InputError, match=f"^(embeddings|context): .*{message}|^{message}"):
        session.append_embeddings(rows)
    assert session.length == 9
    session.truncate(8)
    assert close(session.append(TOKENS[8:9]), before)


def test_a_prompt_and_rows_together_are_refused(toy_program, rows):
    for options, found in (({}, "neither"), ({"prompt": "a", "inputs_embeds": rows}, "both")):
        with pytest.raises(
            InputError, match=f"generate: found {found} of a prompt and inputs_embeds, expected one"
        ):
            toy_program.generate(**options)
