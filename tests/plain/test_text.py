"""Prompts to ids and ids to text, whole and as a stream."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import InputError, ProgramError
from doubleweave.runtime.llm.text import Text

TEXTS = st.text(st.sampled_from("abc é€😀\n"), max_size=20)
STOPS = st.text(st.sampled_from("abc é€"), min_size=1, max_size=4)
TOKENS = st.lists(st.integers(0, toys.VOCAB_SIZE - 1), max_size=30)


@cache
def text_of(**changes) -> Text:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        toys.tokenizer().save(str(path))
        return Text(path, toys.model_info(**changes))


def stream_pieces(token_ids, stop=()):
    """The pieces of a stream fed until it stops, and the stream."""
    stream = text_of().stream(stop)
    pieces = []
    for token in token_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


@given(TEXTS.filter(bool))
def test_raw_text_survives(prompt):
    text = text_of()
    assert text.decode(text.encode(prompt, raw=True)) == prompt
    assert text.encode_raw(prompt) == text.encode(prompt, raw=True) == list(text.encode_raw(prompt))
    assert len(text.encode_raw(prompt)) == len(prompt.encode())


def test_prompt_is_one_user_message_of_the_template():
    text = text_of()
    user, assistant, end = range(256, 259)
    expected = [user, *text.encode_raw("hé"), end, assistant]
    assert text.encode("hé") == expected
    assert text.encode_chat([{"role": "user", "content": "hé"}]) == expected
    assert text.decode(expected) == "hé"


def test_without_a_template_a_prompt_is_raw_and_a_chat_refused():
    text = text_of(chat_template=None)
    assert text.encode("hi") == text.encode("hi", raw=True)
    with pytest.raises(InputError, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "chat template: roles must alternate; give the prompt raw",
        ),
        ("{% for %}", "chat template: .*; give the prompt raw"),
        ("{{ messages[0].content.nothing.more }}", "chat template: .*; give the prompt raw"),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe.*; give the prompt raw"),
        ("{{ 1 / 0 }}", "chat template: .*; give the prompt raw"),
        ("{{ 'a' + 1 }}", "chat template: .*; give the prompt raw"),
    ],
)
def test_a_broken_template_is_the_users_error(template, message):
    with pytest.raises(InputError, match=message):
        text_of(chat_template=template).encode("hi")


def test_empty_prompt():
    for raw in (True, False):
        with pytest.raises(InputError, match="prompt: found an empty text, expected at least one character"):
            text_of().encode("", raw=raw)


def test_half_a_surrogate_pair_is_no_prompt():
    with pytest.raises(InputError, match="prompt: is not valid Unicode"):
        text_of().encode("\udcff")


def test_missing_or_broken_tokenizer(tmp_path):
    with pytest.raises(ProgramError, match=r"missing.*--token-ids"):
        Text(tmp_path / "tokenizer.json", toys.model_info())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ProgramError, match="is not a tokenizer"):
        Text(tmp_path / "tokenizer.json", toys.model_info())


@given(TOKENS)
def test_stream_joins_to_the_decoded_text(token_ids):
    pieces, stream = stream_pieces(token_ids)
    assert "".join(pieces) == text_of().decode(token_ids)
    assert not stream.stopped


@given(TEXTS)
def test_stream_never_shows_half_a_character(prompt):
    pieces, _ = stream_pieces(text_of().encode_raw(prompt))
    assert "".join(pieces) == prompt
    assert not any("\ufffd" in piece for piece in pieces)


@given(TEXTS, STOPS)
def test_stream_ends_before_the_stop_text(prompt, stop):
    pieces, stream = stream_pieces(text_of().encode_raw(prompt), (stop,))
    assert "".join(pieces) == prompt.split(stop)[0]
    assert stream.stopped == (stop in prompt)


@given(TEXTS, st.lists(STOPS, min_size=2, max_size=3))
def test_stream_shows_nothing_of_any_stop_text(prompt, stops):
    pieces, stream = stream_pieces(text_of().encode_raw(prompt), stops)
    shown = "".join(pieces)
    assert prompt.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stream.stopped == any(stop in prompt for stop in stops)


def test_stop_text_across_pieces_is_held_back():
    stream = text_of().stream(("end",))
    given_back = [stream.push(token) for token in text_of().encode_raw("an enemy ends")]
    # "e" and "en" may begin the stop text; they come out with the letter that decides otherwise.
    assert given_back == ["a", "n", " ", "", "", "en", "em", "y", " ", "", "", "", ""]
    assert stream.stopped


def test_empty_stop_text_is_refused():
    with pytest.raises(InputError, match="stop: found an empty text"):
        text_of().stream(("x", ""))
