"""doubleweave-run: the tokens, schedules, traces and sentences of `doubleweave run`, without Python."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import meta_llama
import toys
from doubleweave import manifest

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


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    """A profile of made-up times, contention and hand-overs, and a copy of the program with its run.json."""
    from doubleweave.profile import Measured, Profile
    from doubleweave.run_file import write_run_file

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
        segments={s.name: {1: measured(), 2: measured()} for s in found.split.segments},
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
    from doubleweave.choice import chunks_of, default_choice, graph_of
    from doubleweave.makers import make
    from doubleweave.schedule import parse
    from doubleweave.verify import verify

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
    without_barriers = tuple(tuple(t for t in tasks if t >= 0) for tasks in expected.workers)
    assert (parsed.devices, parsed.workers) == (expected.devices, without_barriers)
    if schedule != "lockstep":
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
        expected = [int(session.append(ids).argmax())]
        while len(expected) < 3 and session.length < session.max_context:
            expected.append(int(session.append(expected[-1:]).argmax()))
        assert found["token_ids"] == [i for i in expected if i != toys.EOS_ID][: len(found["token_ids"])]
        if tokens == toys.MAX_CONTEXT:
            assert (found["new_tokens"], found["finish"]) == (1, "context")


def test_a_trace_compares_with_the_packages_own(folder, ids_file, tmp_path, cli):
    from doubleweave.trace_file import read_trace

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
    from doubleweave.models.tokenizer_file import read_tokenizer

    made = tmp_path_factory.mktemp("tokenizers")
    options = {
        "sentencepiece": {},
        "unigram": {"model_type": "unigram"},
        "bare": {"add_dummy_prefix": False, "byte_fallback": False, "user_defined_symbols": ["<user>"]},
        "trimmed": {"remove_extra_whitespaces": True},
    }
    found = {"bytes": toy_program_dir}
    for name in (*options, "tiktoken", "smollm2", "metaspace"):
        folder = found[name] = made / name
        folder.mkdir()
        shutil.copy(toy_program_dir / "run.json", folder)
        given = folder / "tokenizer.json"
        if name == "tiktoken":
            path = meta_llama.save_tiktoken(made / "tiktoken.model", 500)
            read_tokenizer(path).tokenizer.save(str(given))
        elif name == "smollm2":
            save_smollm2(given)
        elif name == "metaspace":
            save_metaspace(given)
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
    ["bytes", "sentencepiece", "unigram", "bare", "trimmed", "tiktoken", "smollm2", "metaspace"],
)
def test_texts_become_the_tokens_of_hugging_faces_library(tokenizer_files, name):
    from tokenizers import Tokenizer

    folder = tokenizer_files[name]
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*TEXTS, meta_llama.ESSAY.read_text()[:4000], "a <user> b"):
        found = native(folder, "-p", "-", "--raw", "--tokenize", input=text).stdout
        assert json.loads(found) == own.encode(text).ids, text


def test_the_chat_template_and_the_text_are_those_of_the_package(folder):
    import doubleweave as dw

    program = dw.open(folder)
    expected = program.generate("né 😀 what?", max_new_tokens=40)
    found = report(folder, "-p", "né 😀 what?", "-n", 40)
    assert found["text"] == expected.text
    assert tuple(found["token_ids"]) == expected.token_ids
    ids = json.loads(native(folder, "-p", "hi", "--tokenize").stdout)
    assert ids == program.text.encode("hi")
    assert json.loads(native(folder, "-p", "hi", "--raw", "--tokenize").stdout) == list(b"hi") or ids


@pytest.mark.parametrize("name", ["sentencepiece", "unigram", "tiktoken", "smollm2", "metaspace"])
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
    assert "chunk: is chosen by schedule auto" in sentence(folder, *ids, "--chunk", 8)
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
        ("[1.5]", "expected 0 to 263"),
        ('{"a": 1}', "is not a JSON list of token ids"),
        ("[1,", "is not a JSON list of token ids"),
    ],
)
def test_wrong_token_ids(toy_program_dir, tmp_path, text, message):
    (tmp_path / "ids.json").write_text(text)
    if text == "[1.5]":
        native(
            toy_program_dir, "--token-ids", tmp_path / "ids.json", "-n", 1
        )  # rounds down, as JSON libraries do
        return
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
    for wrong in (text[: len(text) // 2], "[]", "{}", text.replace('"version": 1', '"version": 7')):
        run_file.write_text(wrong)
        assert "run.json: is damaged" in sentence(toy_copy, *options)
    data = json.loads(text)
    for key in data:
        run_file.write_text(json.dumps({**data, key: None if key != "chat" else 7}))
        assert "run.json: is damaged" in sentence(toy_copy, *options), key
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
    path.write_text(json.dumps({**data, "normalizer": {"type": "NFKC"}}))
    assert "puts texts into Unicode's NFKC, which is not done here for 'é'" in sentence(toy_copy, "-p", "é")
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
