"""The text that scales are found on: chunks of one size, and what is said of a file that will not do."""

from __future__ import annotations

import json

import pytest

import toys
from doubleweave.compiler.quantize.calibration import MOST_CHUNKS, MOST_TOKENS, Calibration
from doubleweave.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    toys.tokenizer().save(str(path))
    return path


def test_the_packages_own_text_is_the_default(tokenizer):
    chunks = Calibration(tokenizer, 128, toys.VOCAB_SIZE).chunks(None)
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 128)] * (MOST_TOKENS // 128)


def test_chunks_of_one_token_are_fewer(tokenizer):
    assert len(Calibration(tokenizer, 1, toys.VOCAB_SIZE).chunks(None)) == MOST_CHUNKS


def test_token_ids_need_no_tokenizer(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(list(range(20))))
    chunks = Calibration(tmp_path / "none", 8, toys.VOCAB_SIZE).chunks(path)
    assert [chunk.tolist() for chunk in chunks] == [[list(range(8))], [list(range(8, 16))]]


def test_a_text_file(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    (chunk,) = Calibration(tokenizer, 10, toys.VOCAB_SIZE).chunks(path)
    assert chunk.tolist() == [toys.tokenizer().encode("abcdefghij").ids]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", b"ab", "short.txt: found 2 tokens, expected at least 8, one chunk"),
        (
            "ids.json",
            b"[1, 2, 3, 4, 5, 6, 7, 9999]",
            "found token 9999, expected 0 to 263, the model's vocabulary",
        ),
        ("ids.json", b"[1, ", "cannot be read as text or a JSON list of token ids"),
        ("ids.json", b'{"a": 1}', "cannot be read as text or a JSON list of token ids"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read as text or a JSON list of token ids"),
        ("missing.txt", None, "cannot be read as text or a JSON list of token ids"),
    ],
)
def test_what_will_not_do(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Calibration(tokenizer, 8, toys.VOCAB_SIZE).chunks(path)
    assert message in str(caught.value)


def test_a_text_needs_a_tokenizer(tmp_path):
    with pytest.raises(
        InputError, match=r"the model has no tokenizer; give token ids, --calibrate FILE\.json"
    ):
        Calibration(tmp_path / "none", 8, toys.VOCAB_SIZE).chunks(None)
