"""A GGUF file's tokens are those of SentencePiece and of the named patterns; its ends and templates are passed on."""

from __future__ import annotations

import numpy as np
import pytest
import regex
import sentencepiece

from doubleweave.errors import SourceError
from doubleweave.sources.gguf_file import GgufFile
from doubleweave.sources.gguf_pre_tokenizers import CUTS, patterns_of
from doubleweave.sources.gguf_tokenizer import tokenizer_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = (
    "plain words, and  two   spaces",
    " it's they'LL WE'RE don't",
    "12345 + 6.7 = x_1   99",
    "line\nbreak\ttab\r\n\n  end ",
    "né 日本語 かな 한국어 😀 Ünïcode привет",
    "$x<=y^2|`a`~b+c=d (e) a/b//\n",
    "CamelCase HTTPServer iPhone X1000000",
    "a,b.c!d?e…f。g",
    "",
    " ",
)


def gguf(path="a.gguf", **keys):
    """A file of metadata alone; `__` in names stands for a dot."""
    metadata = {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}
    return GgufFile(path, "a", "llama", {"general.architecture": "llama", **metadata}, {})


# Byte pairs


def letters():
    """GPT-2's letters for bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
    return [names[byte] for byte in range(256)]


LETTERS = letters()


def cut(text, patterns):
    """Each pattern cuts what the one before it left; what none takes stays a piece."""
    pieces = [text]
    for pattern in patterns:
        found = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(pattern, piece):
                found += [piece[at : match.start()], match[0]]
                at = match.end()
            found.append(piece[at:])
        pieces = [piece for piece in found if piece]
    return pieces


def byte_pairs(merges=(), extra=(), kinds=None, **keys):
    tokens = [*LETTERS, *(merge.replace(" ", "") for merge in merges), *extra]
    given = {
        "ggml__token_type": [NORMAL] * (len(tokens) - len(extra)) + list(kinds or [CONTROL] * len(extra))
    }
    return gguf(
        **{
            "ggml__model": "gpt2",
            "ggml__pre": "gpt-2",
            "ggml__tokens": tokens,
            "ggml__merges": list(merges),
            **given,
            **keys,
        }
    )


@pytest.mark.parametrize("name", CUTS)
def test_a_named_pattern_cuts_as_the_module_regex_does(name):
    """Every pair of bytes merges here, first come first, so that tokens show where a text was cut."""
    tokenizer = tokenizer_of(byte_pairs(ggml__pre=name)).tokenizer
    for text in TEXTS:
        if text:
            found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
            wanted = [
                "".join(LETTERS[byte] for byte in piece.encode()) for piece in cut(text, patterns_of(name))
            ]
            assert found == wanted
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("smollm", "a  12 b", ["a", "  ", "1", "2", " b"]),
        ("gpt-2", "a  12 b", ["a", " ", " 12", " b"]),
        ("llama-bpe", "a  12345 'LL", ["a", " ", " ", "123", "45", " '", "LL"]),
        ("qwen2", "a 12\n\n b", ["a", " ", "1", "2", "\n\n", " b"]),
        ("deepseek-v3", "a 1234.b", ["a", " ", "123", "4", ".b"]),
        ("deepseek-coder", "ab\ncd 12", ["ab", "\n", "cd", " ", "1", "2"]),
        ("deepseek-llm", "ab cd 12", ["ab", " cd", " ", "12"]),
        ("falcon", "a 12345,b", ["a", " ", "123", "45", ",", "b"]),
        ("default", "a 12345,b", ["a", " ", "123", "45", ",", "b"]),
        ("tekken", "aBc 12", ["a", "Bc", " ", "1", "2"]),
        ("gpt-4o", "aBc's 1234", ["a", "Bc's", " ", "123", "4"]),
        ("superbpe", "a 1234567 b", ["a ", "1", "234", "567", " b"]),
        ("viking", "ab cd12, e", ["ab", " cd", "1", "2", ",", " e"]),
        ("bloom", "ab cd12, e", ["ab", " cd12", ",", " e"]),
        ("chatglm-bpe", "a 1234", ["a", " ", "123", "4"]),
        ("stablelm2", "a 1234", ["a", " ", "1", "2", "3", "4"]),
    ],
)
def test_what_a_name_cuts(name, text, pieces):
    found = tokenizer_of(byte_pairs(ggml__pre=name)).tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in found] == pieces


def test_whole_words_are_not_merged_anew():
    merges = ["a b", "b c"]  # "abc" is a token that no merge makes
    for name, wanted in (("llama-bpe", ["abc"]), ("gpt-2", ["ab", "c"])):
        found = tokenizer_of(byte_pairs(merges, ["abc"], [NORMAL], ggml__pre=name))
        assert found.tokenizer.encode("abc", add_special_tokens=False).tokens == wanted


@pytest.mark.parametrize("name", ["kimi-k2", "of-tomorrow"])
def test_an_unknown_pre_tokenizer_is_refused(name):
    with pytest.raises(SourceError, match=rf"tokenizer\.ggml\.pre '{name}', expected one of .*smollm"):
        tokenizer_of(byte_pairs(ggml__pre=name))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ggml__model": "bert"}, r"tokenizer\.ggml\.model 'bert', expected one of gpt2, llama, t5"),
        ({"ggml__add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token"),
        ({"ggml__suppress_tokens": [3]}, r"tokenizer\.ggml\.suppress_tokens"),
        ({"ggml__normalizer__lowercase": True}, r"tokenizer\.ggml\.normalizer\.lowercase"),
        ({"ggml__merges": ["a bb"]}, r"the merge 'a' 'bb' in tokenizer\.ggml\.merges"),
        ({"ggml__token_type": [1, 1]}, r"2 values of tokenizer\.ggml\.token_type for 256 tokens"),
        ({"ggml__tokens": ["a", "a"], "ggml__token_type": [1, 1]}, r"'a' twice in tokenizer\.ggml\.tokens"),
        ({"ggml__eos_token_id": 999}, r"tokenizer\.ggml\.eos_token_id 999, expected one of the 256 tokens"),
        (
            {"ggml__add_bos_token": True},
            r"tokenizer\.ggml\.add_bos_token, but no tokenizer\.ggml\.bos_token_id",
        ),
    ],
)
def test_keys_that_cannot_be_honoured_are_refused_by_name(keys, message):
    with pytest.raises(SourceError, match=message):
        tokenizer_of(byte_pairs(**keys))


def test_types_of_tokens():
    extra = ["<c>", "<u>", "<x>", "<unk>"]
    found = tokenizer_of(byte_pairs(extra=extra, kinds=[CONTROL, USER_DEFINED, UNUSED, UNKNOWN])).tokenizer
    ids = found.encode("<c><u><x><unk>", add_special_tokens=False).ids
    assert ids == [256, 257, *b"<x>", 259]
    assert found.decode(ids, skip_special_tokens=True) == "<u><x>"


# Ends, begins and templates


@pytest.mark.parametrize(
    ("keys", "texts", "ends"),
    [
        ({"ggml__eos_token_id": 256}, ["<A>", "<B>", "<C>"], (256,)),
        ({"ggml__eos_token_id": 256, "ggml__eot_token_id": 258}, ["<A>", "<B>", "<C>"], (256, 258)),
        ({"ggml__eos_token_id": 256, "ggml__eom_token_id": 257}, ["<A>", "<B>", "<C>"], (256, 257)),
        ({"ggml__eos_token_id": 256}, ["<A>", "<|eot_id|>", "<|eom_id|>"], (256, 257, 258)),
        ({"ggml__eos_token_id": 256}, ["<A>", "<|im_end|>", "<C>"], (256, 257)),
        ({"ggml__eos_token_id": 256}, ["<A>", "<end_of_turn>", "<C>"], (256, 257)),
        ({"ggml__eos_token_id": 256}, ["<A>", "<|end|>", "<|endoftext|>"], (256, 257, 258)),
        ({}, ["</s>", "<B>", "<C>"], (256,)),
        ({}, ["<|return|>", "<|call|>", "<|end|>"], (256, 257)),
        ({}, ["<A>", "<B>", "<C>"], ()),
        ({"ggml__eos_token_id": 2**32 - 1}, ["<A>", "<B>", "<C>"], ()),
    ],
)
def test_all_ends_are_found(keys, texts, ends):
    assert tokenizer_of(byte_pairs(extra=texts, **keys)).eos_token_ids == ends


def test_an_end_that_is_no_control_token_is_read_as_one():
    found = tokenizer_of(byte_pairs(extra=["<|im_end|>"], kinds=[NORMAL])).tokenizer
    assert found.encode("a<|im_end|>").ids == [ord("a"), 256]
    assert found.decode([ord("a"), 256]) == "a"


@pytest.mark.parametrize(
    ("pre", "keys", "wanted"),
    [
        ("gpt-2", {}, "a"),
        ("llama-bpe", {}, "Ba"),
        ("llama-bpe", {"ggml__add_bos_token": False}, "a"),
        ("gpt-2", {"ggml__add_bos_token": True}, "Ba"),
        ("gpt-2", {"ggml__add_eos_token": True}, "aE"),
        ("gpt-2", {"ggml__add_bos_token": True, "ggml__add_eos_token": True}, "BaE"),
    ],
)
def test_begin_and_end_are_put_around_a_text(pre, keys, wanted):
    ids = {"ggml__bos_token_id": 256, "ggml__eos_token_id": 257}
    tokenizer = tokenizer_of(byte_pairs(extra=["<B>", "<E>"], ggml__pre=pre, **ids, **keys)).tokenizer
    names = {256: "B", 257: "E", ord("a"): "a"}
    assert "".join(names[id] for id in tokenizer.encode("a").ids) == wanted


def test_special_tokens_are_passed_on():
    found = tokenizer_of(
        byte_pairs(
            extra=["<B>", "<E>", "<P>"],
            ggml__bos_token_id=256,
            ggml__eos_token_id=257,
            ggml__padding_token_id=258,
        )
    )
    assert found.special == {"bos_token": "<B>", "eos_token": "<E>", "pad_token": "<P>"}


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, None),
        ({"chat_template": "x"}, "x"),
        ({"chat_template": "x", "chat_templates": ["tool_use"], "chat_template__tool_use": "y"}, "x"),
        ({"chat_templates": ["default", "t"], "chat_template__default": "y", "chat_template__t": "z"}, "y"),
        ({"chat_templates": ["rag"], "chat_template__rag": "z"}, "z"),
    ],
)
def test_the_default_template_is_passed_on(keys, wanted):
    assert tokenizer_of(byte_pairs(**keys)).chat_template == wanted


def test_several_templates_without_a_default_are_refused():
    with pytest.raises(
        SourceError, match=r"chat_template\.a, tokenizer\.chat_template\.b, but no tokenizer\.chat"
    ):
        tokenizer_of(byte_pairs(chat_template__a="x", chat_template__b="y"))


# SentencePiece


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains on the essay, once for each set of options."""
    from meta_llama import ESSAY

    folder, made = tmp_path_factory.mktemp("pieces"), {}

    def train(**options):
        key = str(sorted(options.items()))
        if key not in made:
            sentencepiece.SentencePieceTrainer.train(
                input=str(ESSAY),
                model_prefix=str(folder / str(len(made))),
                **{
                    "vocab_size": 420,
                    "model_type": "bpe",
                    "byte_fallback": True,
                    "remove_extra_whitespaces": False,
                    "normalization_rule_name": "identity",
                    "hard_vocab_limit": False,
                    "minloglevel": 2,
                    **options,
                },
            )
            made[key] = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{len(made)}.model"))
        return made[key]

    return train


def from_pieces(pieces, **keys):
    ids = range(pieces.vocab_size())

    def kind(id):
        if pieces.is_unknown(id):
            return UNKNOWN
        if pieces.is_control(id):
            return CONTROL
        if pieces.is_byte(id):
            return BYTE
        return (
            USER_DEFINED
            if pieces.get_score(id) == 0.0 and pieces.id_to_piece(id).startswith("<user")
            else NORMAL
        )

    return gguf(
        **{
            "ggml__model": "llama",
            "ggml__pre": "default",
            "ggml__tokens": [pieces.id_to_piece(id) for id in ids],
            "ggml__scores": [float(np.float32(pieces.get_score(id))) for id in ids],
            "ggml__token_type": [kind(id) for id in ids],
            "ggml__bos_token_id": 1,
            "ggml__eos_token_id": 2,
            "ggml__unknown_token_id": 0,
            **keys,
        }
    )


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize(("model", "kind"), [("llama", "bpe"), ("t5", "unigram")])
def test_pieces_are_sentencepieces_own(trained, prefix, trims, model, kind):
    pieces = trained(model_type=kind, add_dummy_prefix=prefix, remove_extra_whitespaces=trims)
    keys = {"ggml__model": model, "ggml__add_space_prefix": prefix, "ggml__remove_extra_whitespaces": trims}
    tokenizer = tokenizer_of(from_pieces(pieces, **keys)).tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == pieces.encode(text), text
        assert tokenizer.decode(ids) == pieces.decode(ids)


def test_a_space_is_put_first_unless_the_file_says_otherwise(trained):
    pieces = trained(add_dummy_prefix=True)
    assert tokenizer_of(from_pieces(pieces)).tokenizer.encode(
        "so", add_special_tokens=False
    ).ids == pieces.encode("so")


def test_user_defined_pieces_stay_whole(trained):
    pieces = trained(add_dummy_prefix=False, user_defined_symbols=["<user>", "<user2>"])
    tokenizer = tokenizer_of(from_pieces(pieces, ggml__add_space_prefix=False)).tokenizer
    for text in ("a<user>b", "<user2> and <user>", "<user"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == pieces.encode(text)


def test_a_vocabulary_without_bytes_has_an_unknown_piece(trained):
    pieces = trained(byte_fallback=False, add_dummy_prefix=False)
    tokenizer = tokenizer_of(from_pieces(pieces, ggml__add_space_prefix=False)).tokenizer
    assert tokenizer.encode("a 日本 b", add_special_tokens=False).ids == pieces.encode("a 日本 b")


def test_a_begin_is_put_before_a_text_of_pieces(trained):
    tokenizer = tokenizer_of(from_pieces(trained())).tokenizer
    assert tokenizer.encode("a").ids == [1, *tokenizer.encode("a", add_special_tokens=False).ids]


def test_an_alphabet_of_bytes_is_the_libraries():
    from tokenizers import pre_tokenizers

    assert set(LETTERS) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_file_without_tokens_has_no_tokenizer():
    assert tokenizer_of(gguf()) is None
