"""doubleweave-run: the tokens, schedules, traces and sentences of `doubleweave run`, without Python."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import meta_llama
import toys
from doubleweave.ir import manifest

pytestmark = pytest.mark.executorch

# Another build may be tested: one with sanitizers, or for another processor under an emulator.
RUNNER = os.environ.get("DOUBLEWEAVE_RUN", str(Path(sys.executable).parent / "doubleweave-run")).split()
SCHEDULES = ("auto", "sequential", "lockstep", "pipelined", "out_of_order", "wavefront")
PROMPT_IDS = [number % 250 for number in range(7, 7 + 77 * 13, 13)]
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


@pytest.fixture(scope="module", autouse=True)
def runner():
    if shutil.which(RUNNER[-1]) is None:
        pytest.skip("doubleweave-run was not built (its sources of PCRE2 and JSON could not be fetched)")


def native(*argv, code=0, **kwargs):
    done = subprocess.run(
        [*RUNNER, *map(str, argv)], capture_output=True, text=True, timeout=300, check=False, **kwargs
    )
    assert done.returncode == code, done.stderr
    return done


def report(*argv, **kwargs):
    return json.loads(native(*argv, "--json", **kwargs).stdout.splitlines()[-1])


def sentence(*argv, **kwargs):
    """What it refuses with: one line, exit code 2."""
    lines = native(*argv, code=2, **kwargs).stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("doubleweave-run: ")
    return lines[0]


@pytest.fixture(scope="module", params=["bounded", "static"])
def folder(request, toy_program_dir, toy_static_dir):
    return toy_program_dir if request.param == "bounded" else toy_static_dir


@pytest.fixture(scope="module")
def ids_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.json"
    path.write_text(json.dumps(PROMPT_IDS))
    return path


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_tokens_by_every_schedule(folder, ids_file, schedule):
    import doubleweave as dw

    expected = dw.open(folder).generate(PROMPT_IDS, max_new_tokens=24)
    found = report(folder, "--token-ids", ids_file, "-n", 24, "--schedule", schedule)
    assert tuple(found["token_ids"]) == expected.token_ids
    assert (found["text"], found["finish"]) == (expected.text, expected.finish)
    assert (found["prompt_tokens"], found["schedule"]) == (len(PROMPT_IDS), schedule)
    assert set(found) == {
        *("text", "token_ids", "prompt_tokens", "new_tokens", "ttft_s", "prefill_tok_per_s"),
        *("decode_tok_per_s", "kv_bytes_peak", "schedule", "threads", "finish"),
    }


@pytest.fixture(scope="module", params=["measured", "estimated"])
def prepared(request, folder, tmp_path_factory):
    """A profile of made-up times, contention and hand-overs, and a copy of the program with its run.json."""
    from doubleweave.predict.estimate import Device
    from doubleweave.predict.profile import Measured, Profile
    from doubleweave.predict.run_file import write_run_file

    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("prepared") / "program"))
    found, dice = manifest.read(copy), random.Random(5)

    def measured():
        us = tuple(tuple(dice.uniform(10, 900) for _ in range(3)) for _ in range(3))
        return Measured((1, 9, 32), (0, 40, 200), us, repeated=(0.9, 0.8, 0.7))

    devices = {segment.device for segment in found.split.segments}
    pairs = {(a, b): dice.uniform(1, 9) for a in devices for b in devices}
    profile = Profile(
        "made up",
        "measured",
        segments={s.name: {1: measured(), 2: measured()} for s in found.split.segments}
        if request.param == "measured"
        else {},
        devices={d: Device(5.0, 1.0, 20.0, {"float32": 100.0, "int8": 300.0}) for d in devices},
        threads=2,
        hand_over_us=pairs,
        contention={2: {pair: dice.uniform(0, 0.4) for pair in pairs}},
        same_worker_us=0.7,
    )
    write_run_file(copy, found, profile)
    return profile, copy


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("tokens", [1, 31, 33, 77])
def test_the_same_schedule_as_the_package_makes(folder, prepared, schedule, threads, tokens):
    from doubleweave.schedule.choice import chunks_of, default_choice, graph_of
    from doubleweave.schedule.makers import make
    from doubleweave.schedule.schedule import parse
    from doubleweave.schedule.verify import verify

    profile, copy = prepared
    path = copy / "ids.json"
    path.write_text(json.dumps(PROMPT_IDS[:tokens]))
    out = native(
        *(copy, "--token-ids", path, "-n", 1, "--schedule", schedule, "--threads", threads),
        *("--show-schedule",),
    ).stdout
    text = "\n".join(line for line in out.splitlines() if line.startswith(("cpu:", "npu:", "any:")))
    split = manifest.read(folder).split
    choice = default_choice(split, schedule, threads)
    if len(choice.workers) > 1 and len(chunks_of(split, choice, tokens)) == 1:
        choice = default_choice(split, "sequential", threads)
    graph = graph_of(split, choice, chunks_of(split, choice, tokens), "last")
    costs = profile.costs(graph, choice.threads, len(choice.workers))
    expected = make(choice.schedule, graph, choice.workers, costs, choice.threads)
    parsed = parse(text, graph)
    assert parsed.devices == expected.devices
    assert parsed.workers == expected.workers
    verify(parsed, graph)


def test_prompts_of_every_length_and_the_end_of_the_context(folder, tmp_path):
    import doubleweave as dw

    session = dw.open(folder).session("sequential")
    for tokens in (1, 2, 8, 9, 40, 64, 65, toys.MAX_CONTEXT - 1, toys.MAX_CONTEXT):
        ids = [i % 250 for i in range(3, 3 + 7 * tokens, 7)]
        path = tmp_path / "ids.json"
        path.write_text(json.dumps(ids))
        found = report(folder, "--token-ids", path, "-n", 3)
        session.reset()
        expected = toys.greedy(session, ids, 3)
        assert found["token_ids"] == [i for i in expected if i != toys.EOS_ID][: len(found["token_ids"])]
        if tokens == toys.MAX_CONTEXT:
            assert (found["new_tokens"], found["finish"]) == (1, "context")


def test_a_trace_compares_with_the_packages_own(folder, ids_file, tmp_path, cli):
    from doubleweave.timeline.trace_file import read_trace

    options = ("--token-ids", ids_file, "-n", 1, "--schedule", "pipelined")
    own, given = tmp_path / "own.json", tmp_path / "native.json"
    native(folder, *options, "--trace", given)
    assert cli("run", folder, *options, "--trace", own)[0] == 0
    found, expected = read_trace(given), read_trace(own)
    assert found.devices == expected.devices
    assert found.chunks == expected.chunks
    assert {e[:5] for e in found.events} == {e[:5] for e in expected.events}
    assert len(found.links) == len(expected.links)
    assert [c.samples[-1][1] for c in found.counters] == [c.samples[-1][1] for c in expected.counters]
    code, out, _ = cli("trace", own, given)
    assert code == 0
    assert "attention_0" in out


# Text


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


def test_the_chat_template_and_the_text_are_those_of_the_package(folder):
    import doubleweave as dw

    program = dw.open(folder)
    expected = program.generate("né 😀 what?", max_new_tokens=40)
    found = report(folder, "-p", "né 😀 what?", "-n", 40)
    assert found["text"] == expected.text
    assert tuple(found["token_ids"]) == expected.token_ids
    ids = json.loads(native(folder, "-p", "hi", "--tokenize").stdout)
    assert ids == program.text.encode("hi")
    raw = json.loads(native(folder, "-p", "hi", "--raw", "--tokenize").stdout)
    assert raw == program.text.encode("hi", raw=True) != ids


def test_line_ends_on_standard_input_are_those_of_python(toy_program_dir):
    options = (toy_program_dir, "--raw", "--tokenize", "-p")
    found = native(*options, "-", input=b"a\r\nb\rc\n".decode()).stdout
    assert found == native(*options, "a\nb\nc\n").stdout


@pytest.mark.parametrize("content", ["message['content']", "message['content'] | trim"])
def test_chat_templates_that_strip_the_prompt(toy_copy, content):
    """Llama 3's and Gemma's do, SmolLM2's does not."""
    import doubleweave as dw
    from doubleweave.predict.find_profile import find_profile
    from doubleweave.predict.run_file import write_run_file

    found = manifest.read(toy_copy)
    template = "{% for message in messages %}<|user|>{{ " + content + " }}<|end|>{% endfor %}<|assistant|>"
    write(toy_copy, found, chat_template=template)
    write_run_file(toy_copy, manifest.read(toy_copy), find_profile(toy_copy, found))
    expected = dw.open(toy_copy).text.encode(" \n hi there\t\n")
    assert json.loads(native(toy_copy, "-p", " \n hi there\t\n", "--tokenize").stdout) == expected


def test_chat_templates_that_do_more_are_refused(toy_copy):
    from doubleweave.predict.find_profile import find_profile
    from doubleweave.predict.run_file import write_run_file

    found = manifest.read(toy_copy)
    for template in ("{{ messages[0]['content'] | upper }}", "{{ raise_exception('no') }}"):
        write(toy_copy, found, chat_template=template)
        write_run_file(toy_copy, manifest.read(toy_copy), find_profile(toy_copy, found))
        line = sentence(toy_copy, "-p", "hi", "--tokenize")
        assert "the model's chat template does more than to put texts around it" in line
        assert native(toy_copy, "-p", "hi", "--raw", "--tokenize").stdout.startswith("[")


def write(folder, found, **model):
    replace(found, model=replace(found.model, **model)).write(folder)


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


# What is refused


def test_wrong_options_are_one_sentence(toy_program_dir, tmp_path, ids_file):
    folder, ids = toy_program_dir, ("--token-ids", ids_file)
    assert "expected a program folder (see doubleweave-run --help)" in sentence()
    assert "--bad: is no option" in sentence(folder, "--bad")
    assert "expected one program folder" in sentence(folder, folder)
    assert "-p: expected a value" in sentence(folder, "-p")
    assert "num: found 'x', expected a number from 1 on" in sentence(folder, *ids, "-n", "x")
    assert "give either -p PROMPT or --token-ids FILE" in sentence(folder)
    assert "schedule: found 'fast', expected one of auto, " in sentence(folder, *ids, "--schedule", "fast")
    assert "workers: found 'gpu', expected cpu or any" in sentence(
        folder, *ids, "--schedule", "pipelined", "--workers", "gpu,cpu"
    )
    assert "chunk: found 8 with schedule auto, which chooses them" in sentence(folder, *ids, "--chunk", 8)
    assert "threads: found 4096, expected 1 to" in sentence(folder, *ids, "--threads", 4096)
    assert "expected a file name that ends in .json" in sentence(folder, *ids, "--trace", "x.svg")
    assert "does not exist; make it first" in sentence(folder, *ids, "--trace", tmp_path / "no" / "x.json")
    assert "prompt: found an empty text" in sentence(folder, "-p", "")
    assert "is not valid Unicode" in sentence(folder, "-p", b"\xff".decode(errors="surrogateescape"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "found none, expected at least one"),
        ("[1, 264]", r"found 264, expected 0 to 263"),
        ("[-1]", "found -1, expected 0 to 263"),
        ("[1.5]", "is not a JSON list of token ids"),
        ("[true]", "is not a JSON list of token ids"),
        ('{"a": 1}', "is not a JSON list of token ids"),
        ("[1,", "is not a JSON list of token ids"),
    ],
)
def test_wrong_token_ids(toy_program_dir, tmp_path, text, message):
    (tmp_path / "ids.json").write_text(text)
    assert message in sentence(toy_program_dir, "--token-ids", tmp_path / "ids.json")


def test_a_prompt_longer_than_the_context(toy_program_dir, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps([1] * (toys.MAX_CONTEXT + 1)))
    found = sentence(toy_program_dir, "--token-ids", tmp_path / "ids.json")
    assert "0 tokens in the cache and 257 more, expected at most 256: shorten the prompt" in found


def test_damaged_programs(toy_copy, tmp_path, ids_file):
    options = ("--token-ids", ids_file, "-n", 1)
    assert "has no run.json; expected a folder made by doubleweave compile" in sentence(tmp_path, *options)
    run_file = toy_copy / "run.json"
    text = run_file.read_text()
    for wrong in (text[: len(text) // 2], "[]", "{}", text.replace('"version": 3', '"version": 7')):
        run_file.write_text(wrong)
        assert "run.json: is damaged" in sentence(toy_copy, *options)
    data = json.loads(text)
    for key in data:
        run_file.write_text(json.dumps({**data, key: None}))
        assert "run.json: is damaged" in sentence(toy_copy, *options), key
    for key, value in (("decisions", "chunk"), ("decisions", "workers"), ("segments", "device")):
        items = data[key] or [
            {"tokens": 9, "schedule": "wavefront", "threads": 1, "in_flight": 2, "abreast": 1}
        ]
        wrong = {"chunk": 0, "workers": [], "device": "moon"}[value]
        whole_one = {"chunk": 32, "workers": ["any"], **items[0]}
        run_file.write_text(json.dumps({**data, key: [{**whole_one, value: wrong}, *items[1:]]}))
        assert "run.json: is damaged" in sentence(toy_copy, *options), (key, value)
    for key, value in (
        ("vocab_size", 263),
        ("blocks", [len(data["calls"]) - 1]),
        ("output", "input_ids"),
        ("max_context", 2**40),
    ):
        run_file.write_text(json.dumps({**data, key: value}))
        assert "run.json: is damaged" in sentence(toy_copy, *options), key
    waits = [[0, 1, 0], [1, 0, 0]]
    waiting = {**data["pattern"], "body_waits": waits, "last_waits": waits}
    run_file.write_text(json.dumps({**data, "pattern": waiting}))
    for schedule in SCHEDULES:
        native(toy_copy, *options, "--schedule", schedule, code=2)  # and none of them hangs
    run_file.write_text(text)
    program = toy_copy / "program.pte"
    whole = program.read_bytes()
    program.write_bytes(whole[: len(whole) // 2])
    assert "bytes, expected" in sentence(toy_copy, *options)
    program.write_bytes(bytes(len(whole)))
    assert "does not start like an ExecuTorch program" in sentence(toy_copy, *options)
    program.write_bytes(whole.replace(b"XnnpackBackend", b"NowhereBackend"))
    assert (
        "is compiled for backend 'NowhereBackend', which this build of ExecuTorch lacks; it has"
        in sentence(toy_copy, *options)
    )
    program.unlink()
    assert "program.pte: cannot be read" in sentence(toy_copy, *options)


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


def test_help_version_and_no_python(toy_program_dir):
    assert native("--help").stdout.startswith("usage: doubleweave-run")
    assert native("--version").stdout.startswith("doubleweave-run 0.")
    needed = subprocess.run(["ldd", RUNNER[-1]], capture_output=True, text=True, check=True).stdout
    assert "libexecutorch.so" in needed
    assert "python" not in "".join(line.split("=>")[0] for line in needed.splitlines()).lower()


def test_prepare_for_a_chip_that_is_not_there(toy_static_dir, tmp_path, cli, ids_file):
    """Its decisions have workers of several threads: as many as the runner then has."""
    folder = Path(shutil.copytree(toy_static_dir, tmp_path / "program"))
    expected = native(toy_static_dir, "--token-ids", ids_file, "-n", 4).stdout.splitlines()[0]
    assert cli("prepare", folder, "--profile", "sm8650")[0] == 0
    data = json.loads((folder / "run.json").read_text())
    assert data["threads"] == 6
    assert {decision["threads"] for decision in data["decisions"]} <= {1, 6}
    assert native(folder, "--token-ids", ids_file, "-n", 4).stdout.splitlines()[0] == expected
    assert cli("prepare", folder, "--profile", "sm8650", "--threads", 2)[0] == 0
    data = json.loads((folder / "run.json").read_text())
    assert {decision["threads"] for decision in data["decisions"]} <= {1, 2}
    found = native(folder, "--token-ids", ids_file, "-n", 4, "--show-schedule").stdout
    assert found.splitlines()[0] == expected
    for workers in range(3, 20, 8):  # more chunks on their way than run.json has lanes for
        given = ",".join(["any"] * workers)
        out = native(folder, "--token-ids", ids_file, "-n", 4, "--schedule", "wavefront", "--workers", given)
        assert out.stdout.splitlines()[0] == expected


def test_prepare_writes_it_again(toy_copy, cli, ids_file):
    before = native(toy_copy, "--token-ids", ids_file, "-n", 4).stdout.splitlines()[0]
    (toy_copy / "run.json").unlink()
    code, out, _ = cli("prepare", toy_copy, "--profile", "generic", "--threads", 2, "--json")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["threads"] == 2
    data = json.loads((toy_copy / "run.json").read_text())
    assert data["decisions"]
    assert data["decisions"][-1]["tokens"] == toys.MAX_CONTEXT
    assert native(toy_copy, "--token-ids", ids_file, "-n", 4, "--threads", 2).stdout.splitlines()[0] == before
