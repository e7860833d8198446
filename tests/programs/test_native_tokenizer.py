"""The tokenizer of doubleweave-run: the tokens and texts of Hugging Face's tokenizers, for files of every kind."""

from __future__ import annotations

import json
import shutil

import pytest

import meta_llama
import native_runner
from native_runner import fit_digests, needs_runner

pytestmark = needs_runner


def fitting(call):
    """The call of doubleweave-run, for a folder with whatever tokenizer.json it has now."""

    def run(folder, *argv, **kwargs):
        fit_digests(folder)
        return call(folder, *argv, **kwargs)

    return run


native, report, sentence = map(fitting, (native_runner.native, native_runner.report, native_runner.sentence))

TEXTS = (
    "plain words",
    " a  space before, and  two",
    "né 日本語 😀 Ünïcode",
    "12345 + 6.7 = x_1",
    "line\nbreak\ttab\r\n\n  end ",
    "it's they'll WE'RE don't",
    "<|user|>x<|end|> <|end|>",
    "<s>a</s>",
    "\u00a0odd\u2003spaces\u200b here",
)


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory, toy_program_dir):
    """Folders with a run.json and a tokenizer.json of every kind."""
    from doubleweave.sources.tokenizer_file import read_tokenizer

    made = tmp_path_factory.mktemp("tokenizers")
    options = {
        "sentencepiece": {},
        "unigram": {"model_type": "unigram"},
        "bare": {"add_dummy_prefix": False, "byte_fallback": False, "user_defined_symbols": ["<user>"]},
        "trimmed": {"remove_extra_whitespaces": True},
    }
    found = {"bytes": toy_program_dir}
    for name in (*options, "tiktoken", "smollm2", "metaspace", "gemma"):
        folder = found[name] = made / name
        folder.mkdir()
        shutil.copy(toy_program_dir / "run.json", folder)
        given = folder / "tokenizer.json"
        if name == "tiktoken":
            path = meta_llama.save_tiktoken(made / "tiktoken.model", 500)
            read_tokenizer(path).tokenizer.save(str(given))
        elif name == "smollm2":
            save_smollm2(given)
        elif name in ("metaspace", "gemma"):
            (save_metaspace if name == "metaspace" else save_gemma)(given)
        else:
            path = meta_llama.save_sentencepiece(made / f"{name}.model", **options[name])
            read_tokenizer(path).tokenizer.save(str(given))
    return found


def save_smollm2(path):
    """SmolLM2's steps (digits by themselves, then bytes) around byte pairs learnt from the essay."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(meta_llama.ESSAY.read_text().splitlines(), trainer)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, rstrip=True), AddedToken("they", lstrip=True)])
    tokenizer.save(str(path))


def save_split(path, *steps, normalizer=None):
    """Bytes behind pre-tokenizers, with byte pairs learnt from the essay."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(meta_llama.ESSAY.read_text().splitlines(), trainer)
    tokenizer.save(str(path))
    return path


def encoded(folder, text):
    return json.loads(native(folder, "-p", text, "--raw", "--tokenize").stdout)


@pytest.mark.parametrize("inverts", [False, True])
@pytest.mark.parametrize("pattern", ["[aeiou]", " ", r"(?=(\d{3})+(?!\d))", r"\p{N}{1,3}|\s+(?!\S)|\s+"])
@pytest.mark.parametrize(
    "behavior", ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]
)
def test_texts_are_split_as_hugging_faces_library_does(toy_copy, behavior, pattern, inverts):
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    step = pre_tokenizers.Split(Regex(pattern), behavior=behavior, invert=inverts)
    path = save_split(toy_copy / "tokenizer.json", step)
    own = Tokenizer.from_file(str(path))
    text = "aa  queue of 1234567 and 12,  then eau "
    assert encoded(toy_copy, text) == own.encode(text).ids


def test_composed_texts_need_no_normalizing(toy_copy):
    """What Qwen's tokenizer asks for; most texts of most languages are composed."""
    from tokenizers import Tokenizer, normalizers

    path = save_split(toy_copy / "tokenizer.json", normalizer=normalizers.NFC())
    own = Tokenizer.from_file(str(path))
    for text in (
        "Größe, naïve, Việt Nam",
        "你好，世界。「引号」→ ✓ ™ ≤",  # noqa: RUF001
        "한국어 かな カナ",
        "Ελληνικά Кириллица العربية עברית",
        "हिन्दी ไทยที่",
        "❤️ 👩‍👩‍👧 🇫🇷",
    ):
        assert encoded(toy_copy, text) == own.encode(text).ids, text
    line = sentence(toy_copy, "-p", "e\u0301", "--raw", "--tokenize")
    assert "puts texts into Unicode's NFC, which this one may not be in" in line


def save_gemma(path):
    """Gemma's steps: spaces as marks, pieces that end with one, bytes for what is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(meta_llama.ESSAY.read_text().splitlines(), trainer)
    tokenizer.add_tokens([AddedToken("they", normalized=True), AddedToken("\n\n", normalized=False)])
    tokenizer.save(str(path))


def save_metaspace(path):
    """As newer Llama conversions are: Metaspace instead of normalizers."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(meta_llama.ESSAY.read_text().splitlines(), trainer)
    tokenizer.save(str(path))


@pytest.mark.parametrize(
    "name",
    ["bytes", "sentencepiece", "unigram", "bare", "trimmed", "tiktoken", "smollm2", "metaspace", "gemma"],
)
def test_texts_become_the_tokens_of_hugging_faces_library(tokenizer_files, name):
    from tokenizers import Tokenizer

    folder = tokenizer_files[name]
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*TEXTS, meta_llama.ESSAY.read_text()[:4000], "a <user> b"):
        assert encoded(folder, text) == own.encode(text).ids, text


@pytest.mark.parametrize("name", ["sentencepiece", "unigram", "tiktoken", "smollm2", "metaspace", "gemma"])
def test_tokens_become_the_texts_of_hugging_faces_library(tokenizer_files, toy_copy, name):
    """Whatever the model says is decoded as the library does."""
    from tokenizers import Tokenizer

    shutil.copy(tokenizer_files[name] / "tokenizer.json", toy_copy)
    own = Tokenizer.from_file(str(toy_copy / "tokenizer.json"))
    for seed in range(4):
        ids = [i % 250 for i in range(seed, 40 + seed, 3)]
        (toy_copy / "ids.json").write_text(json.dumps(ids))
        found = report(toy_copy, "--token-ids", toy_copy / "ids.json", "-n", 60)
        assert found["text"] == own.decode(found["token_ids"])


@pytest.mark.parametrize(
    "name",
    ["bytes", "sentencepiece", "unigram", "bare", "trimmed", "tiktoken", "smollm2", "metaspace", "gemma"],
)
def test_text_streams_as_in_the_package(tokenizer_files, name, tmp_path):
    """Of random tokens: bytes that are no character, special and added tokens, ids without a token."""
    import numpy as np

    import toys
    from doubleweave.runtime.llm.text import Text

    folder = tokenizer_files[name]
    text = Text(folder / "tokenizer.json", toys.model_info())
    random = np.random.default_rng(5)
    for ids in (
        *(random.integers(0, 720, 200).tolist() for _ in range(4)),
        *(random.integers(0, 270, 200).tolist() for _ in range(4)),
        [*text.encode_raw("né 日本語 😀 <|end|> they  say"), 5, *text.encode_raw("😀")],
        [],
    ):
        (tmp_path / "ids.json").write_text(json.dumps(ids))
        found = json.loads(native(folder, "--token-ids", tmp_path / "ids.json", "--detokenize").stdout)
        stream = text.stream()
        assert found == [*map(stream.push, ids), stream.finish()]
        assert "".join(found) == text.decode(ids)


def test_tokenizers_that_it_cannot_do(toy_copy):
    path = toy_copy / "tokenizer.json"
    data = json.loads(path.read_text())
    for key, value, message in (
        ("normalizer", {"type": "BertNormalizer"}, "needs normalizer 'BertNormalizer' which there is not"),
        ("pre_tokenizer", {"type": "UnicodeScripts"}, "needs pre-tokenizer 'UnicodeScripts'"),
        ("decoder", {"type": "CTC"}, "needs decoder 'CTC'"),
        ("post_processor", {"type": "BertProcessing"}, "needs post-processor 'BertProcessing'"),
        ("model", {"type": "WordPiece", "vocab": {}}, "needs model 'WordPiece'"),
    ):
        path.write_text(json.dumps({**data, key: value}))
        found = sentence(toy_copy, "-p", "hi")
        assert message in found
        assert "give the prompt with --token-ids, or use doubleweave run" in found
    (toy_copy / "ids.json").write_text("[1, 2, 3]")
    done = native(toy_copy, "--token-ids", toy_copy / "ids.json", "-n", 2)  # needs no text
    assert done.stdout.startswith("[")
    assert "needs model 'WordPiece'" in done.stderr
    path.write_text(json.dumps({**data, "normalizer": {"type": "NFKC"}}))
    assert "puts texts into Unicode's NFKC, which this one may not be in" in sentence(toy_copy, "-p", "é")
    for wrong in (-1, 10**9, 2**64 - 1):
        vocab = {**data["model"]["vocab"], "odd": wrong}
        path.write_text(json.dumps({**data, "model": {**data["model"], "vocab": vocab}}))
        assert "needs a token with id " in sentence(toy_copy, "-p", "hi")
    for pattern in ("[a-z&&[b]]", r"\d{1,3}+", "^a", "a$", r"\h"):
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        path.write_text(json.dumps({**data, "pre_tokenizer": step}))
        assert "means another thing in PCRE2" in sentence(toy_copy, "-p", "hi"), pattern
    path.write_text("{")
    assert "is not a tokenizer" in sentence(toy_copy, "-p", "hi")
    path.unlink()
    assert "the model came without a tokenizer; give the prompt with --token-ids" in sentence(
        toy_copy, "-p", "hi"
    )
