"""Text as it streams is the whole text that Hugging Face's tokenizers decode, for every kind of decoder."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import toys
from doubleweave.errors import InputError
from doubleweave.runtime.llm.text import Text

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "none": None,
    "bytes": decoders.ByteLevel(),
    "llama": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(LLAMA),
    "strips both ends": decoders.Sequence([*LLAMA, decoders.Strip(" ", 2, 1)]),
    "strips each": decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
    "replaces more": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁a", "-")]),
    "replaces letters": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "<>")]),
    "metaspace": decoders.Metaspace(),
    "metaspace, first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "bytes in a row": decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
    "wordpiece": decoders.WordPiece(),
    "words' ends": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "▁▁", "▁a", "a", "a▁", "b▁a▁", "日", "##a", "a</w>", ".", "<pad>", " "]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {text: i for i, text in enumerate(dict.fromkeys([*BYTES, *PIECES, *LETTERS]))}
SIZE = len(VOCABULARY) + 4  # with the added tokens, and an id without a token
BYTE_IDS = [VOCABULARY[text] for text in BYTES] + [VOCABULARY[letter] for letter in LETTERS]
# Bytes of characters, whole and broken, among other tokens.
TOKENS = st.lists(
    st.integers(0, SIZE)
    | st.sampled_from([VOCABULARY[text] for text in PIECES])
    | st.sampled_from(BYTE_IDS)
    | st.sampled_from(range(VOCABULARY[PIECES[-1]] + 1, SIZE)),
    max_size=12,
)
PARTS = st.lists(TOKENS | st.text("é日😀a ", max_size=3), max_size=5)


@pytest.fixture(scope="module")
def text_of(tmp_path_factory):
    made = {}

    def text(name):
        if name not in made:
            tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
            if DECODERS[name] is not None:
                tokenizer.decoder = DECODERS[name]
            tokenizer.add_special_tokens(["<s>"])
            tokenizer.add_tokens([AddedToken("▁add ed", normalized=True), AddedToken("é", normalized=False)])
            path = tmp_path_factory.mktemp("text") / "tokenizer.json"
            tokenizer.save(str(path))
            made[name] = Text(path, toys.model_info())
        return made[name]

    return text


def ids_of(parts, is_byte_level):
    """Tokens; texts are the tokens of their bytes."""
    letters = dict(zip(range(256), byte_letters(), strict=True))
    return [
        token
        for part in parts
        for token in (
            part
            if isinstance(part, list)
            else [VOCABULARY[letters[byte] if is_byte_level else BYTES[byte]] for byte in part.encode()]
        )
    ]


def byte_letters():
    """GPT-2's letter of each byte, as the library has them."""
    step = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = {}
    for character in [
        *map(chr, range(0x80)),
        *map(chr, range(0x80, 0x800)),
        "日",
        *map(chr, range(0x1000, 0xD000, 0x1000)),
    ]:
        letters |= dict(zip(character.encode(), step.pre_tokenize_str(character)[0][0], strict=True))
    letters |= {byte: "?" for byte in range(256) if byte not in letters}
    return [letters[byte] for byte in range(256)]


# The library's Strip panics where a text of spaces alone is shorter than what it strips.
@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"strips both ends"}))
@settings(max_examples=150)
@given(parts=PARTS)
def test_pieces_join_to_the_whole(text_of, name, parts):
    text = text_of(name)
    ids = ids_of(parts, "bytes" in name or "letters" in name)
    stream = text.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == text.decode(ids)


def test_what_is_certain_is_shown_at_once(text_of):
    def shown(name, *tokens):
        stream = text_of(name).stream()
        return [*(stream.push(VOCABULARY[token]) for token in tokens), stream.finish()]

    assert shown("llama", "▁a", "▁a", "<0xC3>", "<0xA9>", "▁", "a") == ["a", " a", "", "", "é ", "a", ""]
    assert shown("llama", "▁", "▁", "a", "<0xC3>", "a") == ["", " ", "a", "", "\ufffda", ""]
    assert shown("bytes", "a", "Ã", "©", "Ã", "a", "Ã") == ["a", "", "é", "", "\ufffda", "", "\ufffd"]
    assert shown("strips both ends", "▁", "▁▁", "a▁", "▁", "a▁") == ["", "", " a", " ", " a", ""]
    assert shown("none", "a", "a") == ["a", " a", ""]


def test_a_long_answer_takes_linear_time(text_of):
    def seconds(name, num, token):
        stream = text_of(name).stream(["never"])
        start = time.perf_counter()
        for _ in range(num):
            stream.push(VOCABULARY[token])
        stream.finish()
        return time.perf_counter() - start

    for name, token in (("llama", "▁a"), ("llama", "<0xFF>"), ("bytes", "Ã"), ("metaspace", "▁")):
        assert seconds(name, 30_000, token) < 40 * max(seconds(name, 3_000, token), 1e-3)


def test_stop_is_a_list(text_of):
    with pytest.raises(
        InputError, match=r"stop: found the text 'end', expected a list of texts, such as \['end'\]"
    ):
        text_of("bytes").stream("end")


def test_a_stopped_stream_shows_nothing_more(text_of):
    stream = text_of("bytes").stream(["b"])
    assert [stream.push(VOCABULARY[letter]) for letter in "aba"] == ["a", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_the_decoder_of_a_tokenizer_is_json():
    """`Text.stream` reads it so, without the vocabulary."""
    assert json.loads(decoders.ByteLevel().__getstate__())["type"] == "ByteLevel"
