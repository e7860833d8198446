"""Sessions on the toy program: the same numbers however the tokens come, and memory that follows them."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from doubleweave.errors import InputError
from doubleweave.schedule.choice import SCHEDULES

TOKENS = np.random.default_rng(7).integers(0, toys.VOCAB_SIZE, toys.MAX_CONTEXT)
PAGE_BYTES = resource.getpagesize()


@pytest.fixture(scope="module")
def reference():
    """Logits float32 [T, vocab] of Hugging Face's own forward pass, for every prefix of TOKENS."""
    import torch

    with torch.no_grad():
        return toys.module()(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def close(found, wanted):
    return np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 31, 32, 33, 64, 113, 256])
def test_logits_are_those_of_the_model(program, reference, schedule, num_tokens):
    session = program.session(schedule)
    assert close(session.append(TOKENS[:num_tokens]), reference[num_tokens - 1])
    assert session.length == num_tokens


@given(data=st.data())
@settings(max_examples=25)
def test_pieces_give_what_the_whole_gives(program, reference, data):
    session = program.session(data.draw(st.sampled_from(SCHEDULES)))
    while session.length < 100 and (session.length == 0 or data.draw(st.booleans())):
        count = data.draw(st.integers(1, 40))
        logits = session.append(TOKENS[session.length : session.length + count])
        assert close(logits, reference[session.length - 1])


def test_token_by_token(program, reference):
    session = program.session()
    logits = [session.append([token]) for token in TOKENS[:50]]
    assert close(np.stack(logits), reference[:50])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scores_are_the_logits_of_every_token(program, reference, schedule):
    session = program.session(schedule)
    assert session.score_rows < 200  # so that several runs are joined
    session.append(TOKENS[:5])
    assert close(session.score(TOKENS[5:205]), reference[5:205])


@given(data=st.data())
@settings(max_examples=20)
def test_truncated_tokens_leave_no_trace(program, reference, data):
    session = program.session()
    kept = data.draw(st.integers(0, 60))
    wrong = data.draw(st.integers(1, 60))
    if kept:
        session.append(TOKENS[:kept])
    session.append((TOKENS[kept : kept + wrong] + 1) % toys.VOCAB_SIZE)
    session.truncate(kept)
    assert session.length == kept
    assert close(session.append(TOKENS[kept : kept + 3]), reference[kept + 2])


def test_reset_forgets_everything(program, reference):
    session = program.session()
    session.append(TOKENS[100:140])
    session.reset()
    assert session.length == 0
    assert close(session.append(TOKENS[:20]), reference[19])


def test_sessions_are_independent(program, reference):
    first, second = program.session(), program.session("sequential")
    first.append(TOKENS[:10])
    second.append(TOKENS[50:90])
    assert close(first.append(TOKENS[10:30]), reference[29])


def test_greedy_tokens_do_not_depend_on_schedule_or_shape(toy_program, toy_static_program):
    found = {
        (program.folder.name, schedule, threads): program.generate(
            TOKENS[:70], 40, session=program.session(schedule, threads)
        ).token_ids
        for program in (toy_program, toy_static_program)
        for schedule in SCHEDULES
        for threads in (1, None)
    }
    assert len(found) == 4 * len(SCHEDULES)
    assert len(set(found.values())) == 1
    assert len(next(iter(found.values()))) == 40


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "found none, expected at least one: the prompt is empty"),
        (
            [[1, 2], [3, 4]],
            r"found shape \[2, 2\], expected \[T\].*batch larger than 1 needs one session a sequence",
        ),
        ([[[1]]], r"found shape \[1, 1, 1\]"),
        (5, r"found shape \[\]"),
        ([1.5], "found dtype float64, expected integers"),
        ([True], "found dtype bool, expected integers"),
        (["a"], "found dtype <U1, expected integers"),
        ([0, -1], f"found -1, expected 0 to {toys.VOCAB_SIZE - 1}"),
        ([toys.VOCAB_SIZE], f"found {toys.VOCAB_SIZE}, expected 0 to {toys.VOCAB_SIZE - 1}"),
        ([2**63], f"found {2**63}, expected 0 to"),
        ([2**70], "found dtype object, expected integers"),
        ([[1, 2], [3]], "found lists of several lengths, expected one list"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("method", ["append", "score"])
def test_bad_token_ids_are_refused_and_nothing_is_appended(
    toy_program, reference, method, token_ids, message
):
    session = toy_program.session()
    session.append(TOKENS[:9])
    with pytest.raises(InputError, match=message):
        getattr(session, method)(token_ids)
    assert session.length == 9
    assert close(session.append(TOKENS[9:11]), reference[10])


def test_one_sequence_may_come_as_a_batch_of_one(toy_program, reference):
    assert close(toy_program.session().append(TOKENS[None, :12]), reference[11])


def test_the_context_can_be_filled_but_not_overfilled(program, reference):
    session = program.session()
    assert session.max_context == toys.MAX_CONTEXT
    with pytest.raises(
        InputError, match=r"0 tokens in the cache and 257 more make 257, expected at most 256"
    ):
        session.append(np.zeros(257, dtype=np.int64))
    assert close(session.append(TOKENS), reference[-1])
    with pytest.raises(InputError, match=r"shorten the prompt, or truncate or reset the session"):
        session.append([1])
    assert session.length == 256


@pytest.mark.parametrize("num_tokens", [-1, 10])
def test_truncate_out_of_range(toy_program, num_tokens):
    session = toy_program.session()
    session.append(TOKENS[:9])
    with pytest.raises(InputError, match=rf"truncate: found {num_tokens}, expected 0 to 9"):
        session.truncate(num_tokens)
    assert session.length == 9


def test_unknown_schedule_and_threads(toy_program):
    with pytest.raises(
        InputError, match="found 'fast', expected one of auto, sequential, lockstep, pipelined"
    ):
        toy_program.session("fast")
    for threads in (0, -1, 1000):
        with pytest.raises(InputError, match=rf"threads: found {threads}, expected 1 to \d+"):
            toy_program.session(threads=threads)


def test_timeline_is_recorded_on_request(toy_program):
    session = toy_program.session("wavefront", workers=("any", "any"))
    session.append(TOKENS[:100])
    assert session.timeline is None
    session.append(TOKENS[100:200], record=True)
    assert {event.chunk for event in session.timeline.events} == {0, 1, 2, 3}
    assert {event.worker for event in session.timeline.events} == {0, 1}
    assert all(event.end_ns >= event.start_ns for event in session.timeline.events)


def cached_bytes(num_tokens):
    return 2 * toys.NUM_LAYERS * num_tokens * toys.NUM_KV_HEADS * toys.HEAD_DIM * 4


def test_cache_bytes_follow_the_tokens(program):
    session = program.session()
    assert session.kv_bytes == 0
    slack = 2 * toys.NUM_LAYERS * 2 * PAGE_BYTES  # a page at each end of each layer's keys and values
    padding = cached_bytes(32)
    for num_tokens in (32, 96, 256):
        session.append(TOKENS[session.length : num_tokens])
        assert cached_bytes(num_tokens) <= session.kv_bytes <= cached_bytes(num_tokens) + slack + padding
    peak = session.kv_bytes_peak
    assert peak == session.kv_bytes
    session.truncate(32)
    assert session.kv_bytes <= cached_bytes(32) + slack
    session.reset()
    assert (session.kv_bytes, session.kv_bytes_peak) == (0, peak)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
def test_resident_memory_follows_the_tokens(toy_program):
    """Many sessions at once, because one toy's cache is smaller than what else moves in a process."""
    toy_program.session("sequential", 1).append(TOKENS)  # loads methods
    sessions = [toy_program.session("sequential", 1) for _ in range(60)]
    for session in sessions:
        session.append(TOKENS[:1])
    for session in sessions:
        session.reset()
    start = resident_bytes()
    resident, reported = [], []
    for num_tokens in (128, 256):
        for session in sessions:
            session.append(TOKENS[session.length : num_tokens])
            session._prepared.clear()  # buffers of this length: not the cache
        resident.append(resident_bytes() - start)
        reported.append(sum(session.kv_bytes for session in sessions))
    assert reported[1] >= 60 * cached_bytes(256)
    for session in sessions:
        session.truncate(1)
    kept = resident_bytes() - start
    tolerance = 2 << 20
    assert abs((resident[1] - resident[0]) - (reported[1] - reported[0])) < tolerance
    assert abs((resident[1] - kept) - (reported[1] - sum(s.kv_bytes for s in sessions))) < tolerance


def test_the_text_of_a_stream_is_that_of_its_tokens(program):
    for prompt, options in (
        ("né 😀 what?", {}),
        ("né 😀 what?", {"raw": True, "temperature": 3.0, "seed": 4}),
        ([3, 1, 200, 255], {"temperature": 5.0, "seed": 1}),
    ):
        whole = program.generate(prompt, 60, **options)
        pieces = list(program.stream_text(program.session(), prompt, 60, **options))
        assert "".join(pieces) == whole.text == program.text.decode(whole.token_ids)
        assert all(pieces)
        if len(whole.text) > 4:
            stop = whole.text[3:5]
            pieces = program.stream_text(program.session(), prompt, 60, stop=(stop,), **options)
            assert "".join(pieces) == whole.text.split(stop)[0]


def test_a_stream_refuses_wrong_options_before_it_runs(program):
    session = program.session()
    for options, message in (
        ({"top_k": 3}, "stream_text: found argument 'top_k', expected temperature, top_p or seed"),
        ({"stop": "end"}, "stop: found the text 'end', expected a list of texts"),
        ({"temperature": -1.0}, "temperature: found -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            program.stream_text(session, "hi", **options)
    assert session.length == 0
