"""doubleweave-run: the tokens, schedules, traces and sentences of `doubleweave run`, without Python."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import toys
from doubleweave.ir import manifest
from doubleweave.ir.seal import digest_of
from doubleweave.predict.run_file import VERSION
from native_runner import RUNNER, fit_digests, native, needs_runner, report, sentence, write_sealed

pytestmark = needs_runner

SCHEDULES = ("auto", "sequential", "lockstep", "pipelined", "out_of_order", "wavefront")
PROMPT_IDS = [number % 250 for number in range(7, 7 + 77 * 13, 13)]


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
    costs = toys.costs(profile, graph, choice.threads, len(choice.workers))
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
    for template in (
        "{{ messages[0]['content'] | upper }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}",
        "{{ messages[0]['content'] }}{% if '?' in messages[0]['content'] %}x{% endif %}",
        {"tool_use": "{{ messages[0]['content'] }}"},
    ):
        write(toy_copy, found, chat_template=template)
        write_run_file(toy_copy, manifest.read(toy_copy), find_profile(toy_copy, found))
        line = sentence(toy_copy, "-p", "hi", "--tokenize")
        assert "the model's chat template does more than to put texts around it" in line
        assert "give the prompt raw (--raw) or as token ids (--token-ids), or use doubleweave run" in line
        assert native(toy_copy, "-p", "hi", "--raw", "--tokenize").stdout.startswith("[")


def test_special_tokens_are_given_once(toy_copy):
    """By a template that writes the token which the tokenizer puts before every text."""
    from tokenizers import Tokenizer, processors

    import doubleweave as dw
    from doubleweave.predict.find_profile import find_profile
    from doubleweave.predict.run_file import write_run_file

    path = toy_copy / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    begin = tokenizer.token_to_id("<|user|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begin)]
    )
    tokenizer.save(str(path))
    found = replace(manifest.read(toy_copy), tokenizer_digest=digest_of(path))
    named = {"default": "<|user|>{{ messages[0]['content'] }}", "tool_use": "tools"}
    for template in (named, named["default"], None):
        write(toy_copy, found, chat_template=template)
        write_run_file(toy_copy, manifest.read(toy_copy), find_profile(toy_copy, found))
        text = dw.open(toy_copy).text
        for raw in (False, True):
            ids = json.loads(native(toy_copy, "-p", "hi", "--tokenize", *["--raw"] * raw).stdout)
            assert ids == text.encode("hi", raw=raw)
            assert ids.count(begin) == 1
    assert text.encode_raw("hi").count(begin) == 0


def write(folder, found, **model):
    replace(found, model=replace(found.model, **model)).write(folder)


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
    other_version = text.replace(f'"version": {VERSION}', f'"version": {VERSION + 2}')
    assert other_version != text
    for wrong in (text[: len(text) // 2], "[]", "{}", other_version):
        run_file.write_text(wrong)
        assert "run.json: is damaged" in sentence(toy_copy, *options)
    data = json.loads(text)
    write_sealed(run_file, data, version=VERSION + 1)
    assert "is of another version" in sentence(toy_copy, *options)
    for key in data.keys() - {"seal"}:
        write_sealed(run_file, {**data, key: None})
        assert "run.json: is damaged" in sentence(toy_copy, *options), key
    for key, value in (("decisions", "chunk"), ("decisions", "workers"), ("segments", "device")):
        items = data[key] or [
            {"tokens": 9, "schedule": "wavefront", "threads": 1, "in_flight": 2, "abreast": 1}
        ]
        wrong = {"chunk": 0, "workers": [], "device": "moon"}[value]
        whole_one = {"chunk": 32, "workers": ["any"], **items[0]}
        write_sealed(run_file, {**data, key: [{**whole_one, value: wrong}, *items[1:]]})
        assert "run.json: is damaged" in sentence(toy_copy, *options), (key, value)
    for key, value in (
        ("vocab_size", 263),
        ("blocks", [len(data["calls"]) - 1]),
        ("output", "input_ids"),
        ("max_context", 2**40),
    ):
        write_sealed(run_file, {**data, key: value})
        assert "run.json: is damaged" in sentence(toy_copy, *options), key
    waits = [[0, 1, 0], [1, 0, 0]]
    waiting = {**data["pattern"], "body_waits": waits, "last_waits": waits}
    write_sealed(run_file, data, pattern=waiting)
    for schedule in SCHEDULES:
        native(toy_copy, *options, "--schedule", schedule, code=2)  # and none of them hangs
    run_file.write_text(text)
    program = toy_copy / "program.pte"
    whole = program.read_bytes()
    program.write_bytes(whole[: len(whole) // 2])
    assert "bytes, expected" in sentence(toy_copy, *options)
    program.write_bytes(bytes(len(whole)))
    assert "does not start like an ExecuTorch program" in sentence(toy_copy, *options)
    for place in range(0, len(whole), len(whole) // 50):
        program.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        line = sentence(toy_copy, *options)
        assert "digest than when it was compiled" in line or "does not start like" in line, place
    program.write_bytes(whole.replace(b"XnnpackBackend", b"NowhereBackend"))
    assert "digest than when it was compiled; compile it again" in sentence(toy_copy, *options)
    fit_digests(toy_copy)
    assert (
        "is compiled for backend 'NowhereBackend', which this build of ExecuTorch lacks; it has"
        in sentence(toy_copy, *options)
    )
    program.unlink()
    assert "program.pte: cannot be read" in sentence(toy_copy, *options)


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
