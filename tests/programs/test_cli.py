"""The command line on the toy program: what it prints, and one line for everything that can be wrong.

What the commands do when compiling is test_compile_llm.py, damaged manifests test_manifest.py, usage test_cli_usage.py.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import toys
from doubleweave.ir import manifest
from doubleweave.ir.seal import sealed
from doubleweave.schedule.choice import SCHEDULES
from doubleweave.texts import held_out_texts


def last_json(out):
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_run_reports(cli, toy_program_dir, toy_program, schedule):
    prompt = "x" * 70
    code, out, err = cli(
        "run", toy_program_dir, "-p", prompt, "-n", 9, "--schedule", schedule, "--trace", "--json"
    )
    assert (code, err) == (0, "")
    report = last_json(out)
    wanted = toy_program.generate(prompt, 9)
    assert report["text"] == wanted.text
    assert report["token_ids"] == list(wanted.token_ids)
    assert (report["prompt_tokens"], report["new_tokens"]) == (73, 9)
    assert report["schedule"] == schedule
    for key in ("ttft_s", "prefill_tok_per_s", "decode_tok_per_s", "kv_bytes_peak"):
        assert report[key] > 0
    assert out.startswith(wanted.text)
    assert re.search(r"worker 0 (any|cpu) +\|", out)
    assert "prompt 73 tokens, 9 new" in out


def test_run_takes_token_ids_and_prompts_from_files(cli, toy_program_dir, toy_program, tmp_path, monkeypatch):
    ids = [5, 6, 7, 8]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    _, out, _ = cli("run", toy_program_dir, "--token-ids", tmp_path / "ids.json", "-n", 5, "--json")
    assert last_json(out)["token_ids"] == list(toy_program.generate(ids, 5).token_ids)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    _, out, _ = cli("run", toy_program_dir, "-p", "-", "--raw", "-n", 5, "--json")
    assert last_json(out)["token_ids"] == list(toy_program.generate("from a pipe", 5, raw=True).token_ids)


def test_run_stops_and_samples(cli, toy_program_dir):
    def run(*more):
        return last_json(cli("run", toy_program_dir, "-p", "go", "-n", 30, "--json", *more)[1])

    greedy = run()
    stop = next(letter for letter in greedy["text"] if letter.isascii())
    stopped = run("--stop", stop)
    assert stopped["text"] == greedy["text"].split(stop)[0]
    assert stopped["finish"] == "stop"
    hot = ["--temperature", 3, "--top-p", 0.9]
    assert run(*hot, "--seed", 4)["token_ids"] == run(*hot, "--seed", 4)["token_ids"]
    assert run(*hot, "--seed", 4)["token_ids"] != run(*hot, "--seed", 5)["token_ids"]


def test_run_ends_with_the_context(cli, toy_program_dir):
    report = last_json(cli("run", toy_program_dir, "-p", "y" * 250, "--raw", "-n", 500, "--json")[1])
    assert report["finish"] in ("context", "end")
    assert report["new_tokens"] <= toys.MAX_CONTEXT - 250 + 1


@pytest.mark.parametrize("fixture", ["toy_program_dir", "toy_static_dir"])
def test_inspect_reports_every_segment(cli, fixture, request):
    code, out, _ = cli("inspect", request.getfixturevalue(fixture), "--calls", "--json")
    report = last_json(out)
    assert code == 0
    segments = {segment["name"]: segment for segment in report["segments"]}
    assert {"embed_tokens", "rotary", "attention", "lm_head", *(f"block_{i}" for i in range(4))} == set(
        segments
    )
    assert segments["attention"]["calls"] == toys.NUM_LAYERS
    assert segments["attention"]["shape"] == "dynamic T 1..32, S T..256"
    assert segments["block_1"]["shape"] == ("dynamic T 1..32" if "program" in fixture else "static 1,8,32")
    # Rotary of queries and of keys is our own kernel.
    assert segments["block_1"]["delegated"] == segments["block_1"]["operators"] - 2 > 10
    assert segments["lm_head"]["weight_bytes"] >= toys.VOCAB_SIZE * toys.HIDDEN * 4
    assert {"device", "backend", "methods"} <= set(segments["block_1"])
    assert all(name in out for name in segments)


def test_bench_reports_medians_and_spread(cli, toy_program_dir):
    code, out, _ = cli("bench", toy_program_dir, "--prompt-len", 40, "--gen", 3, "--runs", 3, "--json")
    report = last_json(out)
    assert code == 0
    assert (report["prompt_tokens"], report["new_tokens"], report["runs"]) == (40, 3, 3)
    for key in ("prefill_tok_per_s", "decode_tok_per_s", "ttft_s", "makespan_s"):
        assert 0 < report[f"{key}_min"] <= report[key] <= report[f"{key}_max"]
    assert report["makespan_s"] <= report["ttft_s"]
    assert "prefill tokens/s" in out


def test_score_is_the_perplexity_of_the_model(cli, toy_program_dir, toy_static_dir, tmp_path):
    import torch

    text = "a text that is longer than one chunk of the toy, so that it is scored in several of them" * 2
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor([toys.tokenizer().encode(text, add_special_tokens=False).ids])
    with torch.no_grad():
        loss = float(toys.module()(ids, labels=ids).loss)
    for folder in (toy_program_dir, toy_static_dir):
        code, out, _ = cli("score", folder, tmp_path / "text.txt", "--json")
        report = last_json(out)
        assert code == 0
        assert report["tokens"] == ids.shape[1] - 1
        assert np.isclose(report["nll"], loss, rtol=1e-5)
        assert np.isclose(report["perplexity"], np.exp(loss), rtol=1e-4)


def test_score_against_float32(cli, refused, toy_program_dir, toy_8da4w_dir, toy_copy, tmp_path):
    (tmp_path / "text.txt").write_text("a text that is longer than one chunk of the toy, " * 3)
    code, out, _ = cli("score", toy_8da4w_dir, tmp_path / "text.txt", "--against", toy_program_dir, "--json")
    report = last_json(out)
    assert code == 0
    assert report["over"] == pytest.approx(report["perplexity"] / np.exp(report["exact_nll"]) - 1)
    assert 0 < report["kl"] < 1
    assert 0 < report["top1"] <= 1
    assert f"{report['over']:+.2%}" in out
    code, out, _ = cli(
        "score", toy_program_dir, tmp_path / "text.txt", "--against", toy_program_dir, "--json"
    )
    same = last_json(out)
    assert (same["over"], same["kl"], same["top1"]) == (0, 0, 1)
    message = refused("score", toy_program_dir, tmp_path / "text.txt", "--against", toy_8da4w_dir)
    assert "is compiled with --quantize 8da4w; expected --quantize none" in message
    replace(manifest.read(toy_copy), tokenizer_digest="0" * 16).write(toy_copy)
    message = refused("score", toy_program_dir, tmp_path / "text.txt", "--against", toy_copy)
    assert "has another tokenizer or vocabulary; expected a program of the same model" in message


def test_score_without_a_file_takes_the_texts_of_the_package(cli, toy_program_dir, monkeypatch):
    texts = {name: text[:400] for name, text in held_out_texts().items()}
    monkeypatch.setattr("doubleweave.cli.run.held_out_texts", lambda: texts)
    code, out, _ = cli("score", toy_program_dir, "--json")
    report = last_json(out)
    assert code == 0
    assert [each["text"] for each in report["scores"]] == list(texts)
    for each in report["scores"]:
        assert each["num_tokens"] == len(toys.tokenizer().encode(texts[each["text"]]).ids) - 1
    assert sum(each["num_tokens"] for each in report["scores"]) == report["tokens"]
    mean = sum(each["nll"] * each["num_tokens"] for each in report["scores"]) / report["tokens"]
    assert report["nll"] == pytest.approx(mean)


PROMPT = ["-p", "hello"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-p", ""], "prompt: found an empty text, expected at least one character"),
        (["-p", "", "--raw"], "prompt: found an empty text"),
        (["-p", "z" * 300], "303 more make 303, expected at most 256: shorten the prompt"),
        (["-p", "\udcff"], "prompt: is not valid Unicode"),
        ([], "prompt: give either -p PROMPT or --token-ids FILE"),
        ([*PROMPT, "--token-ids", "x"], "prompt: give either -p PROMPT or --token-ids FILE"),
        ([*PROMPT, "-n", 0], "number of new tokens: found 0, expected at least 1"),
        ([*PROMPT, "-n", -5], "found -5"),
        (
            [*PROMPT, "--schedule", "fastest"],
            "found 'fastest', expected one of auto, sequential, lockstep, pipelined",
        ),
        ([*PROMPT, "--threads", 0], "threads: found 0, expected 1 to"),
        ([*PROMPT, "--threads", 1000], "threads: found 1000, expected 1 to"),
        ([*PROMPT, "--temperature", -1], "temperature: found -1.0, expected 0 (greedy) or more"),
        ([*PROMPT, "--temperature", "nan"], "temperature: found nan"),
        ([*PROMPT, "--top-p", 0], "top-p: found 0.0, expected more than 0 and at most 1"),
        ([*PROMPT, "--seed", -1], "seed: found -1, expected 0 or more"),
        ([*PROMPT, "--stop", ""], "stop: found an empty text"),
    ],
)
def test_run_refuses(refused, toy_program_dir, argv, message):
    assert message in refused("run", toy_program_dir, *argv)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as a JSON list of token ids"),
        (b"[1, 2", "cannot be read as a JSON list of token ids"),
        (b"\xff\xfe", "cannot be read as a JSON list of token ids"),
        (b"[" * 100_000, "cannot be read as a JSON list of token ids"),
        (b"[" + b"1" * 5000 + b"]", "cannot be read as a JSON list of token ids"),
        (b"{}", "expected a JSON list of integers"),
        (b"7", "expected a JSON list of integers"),
        (b"[1, 2.0]", "expected a JSON list of integers"),
        (b"[true]", "expected a JSON list of integers"),
        (b'["1"]', "expected a JSON list of integers"),
        (b"[[1, 2], [3, 4]]", "expected a JSON list of integers"),
        (b"[]", "token ids: found none"),
        (b"[1, -1]", f"token ids: found -1, expected 0 to {toys.VOCAB_SIZE - 1}"),
        (b"[264]", f"token ids: found 264, expected 0 to {toys.VOCAB_SIZE - 1}"),
        (b"[99999999999999999999999]", "token ids: found"),
        (None, "cannot be read as a JSON list of token ids"),
    ],
    ids=lambda data: repr(data)[:20],
)
@pytest.mark.parametrize("command", ["run", "bench"])
def test_bad_token_ids(refused, toy_program_dir, tmp_path, command, data, message):
    path = tmp_path / "ids.json"
    if data is not None:
        path.write_bytes(data)
    assert message in refused(command, toy_program_dir, "--token-ids", path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt-len", 0], "prompt-len: found 0, expected at least 1"),
        (["--prompt-len", 250], "context: 250 prompt and 64 decoded tokens, expected at most 256 together"),
        (["--gen", -1], "gen: found -1, expected at least 0"),
        (["--runs", 0], "runs: found 0, expected at least 1"),
        (["--schedule", "x"], "schedule: found 'x'"),
    ],
)
def test_bench_refuses(refused, toy_program_dir, argv, message):
    assert message in refused("bench", toy_program_dir, *argv)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot be read as text"),
        (b"\xff", "cannot be read as text"),
        (b"", "found 0 tokens"),
        (b"a", "found 1 tokens"),
    ],
)
def test_score_refuses(refused, toy_program_dir, tmp_path, data, message):
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    assert message in refused("score", toy_program_dir, tmp_path / "text")


def commands_on(folder, tmp_path):
    text = tmp_path / "some_text"
    text.write_text("text")
    return [["run", folder, "-p", "hi"], ["inspect", folder], ["bench", folder], ["score", folder, text]]


def damage_program(folder, change):
    path = folder / "program.pte"
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data))


def flip(share):
    def change(data):
        data[min(int(share * len(data)), len(data) - 1)] ^= 4
        return data

    return change


@pytest.mark.parametrize("share", [0.0, 0.00002, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit(refused, toy_copy, tmp_path, share):
    damage_program(toy_copy, flip(share))
    for argv in commands_on(toy_copy, tmp_path):
        line = refused(*argv)
        assert "the file was changed or damaged; compile it again" in line


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_a_truncated_program(refused, toy_copy, tmp_path, share):
    damage_program(toy_copy, lambda data: data[: int(share * len(data))])
    for argv in commands_on(toy_copy, tmp_path):
        assert "is truncated or of another program; compile it again" in refused(*argv)


def test_missing_parts(refused, toy_copy, tmp_path):
    for argv in commands_on(tmp_path / "nothing", tmp_path):
        assert "make one with: doubleweave compile SOURCE -o" in refused(*argv)
    (toy_copy / "tokenizer.json").unlink()
    assert "give the prompt with --token-ids" in refused("run", toy_copy, "-p", "hi")
    (toy_copy / "program.pte").unlink()
    for argv in commands_on(toy_copy, tmp_path):
        assert "compile the program again" in refused(*argv)
    (toy_copy / "manifest.json").unlink()
    for argv in commands_on(toy_copy, tmp_path):
        assert "missing; expected a folder made by doubleweave compile" in refused(*argv)


@pytest.mark.parametrize("size_bytes", [0, 3, 1000, 100_000])
def test_a_damaged_program_with_a_digest_that_fits(refused, toy_copy, size_bytes):
    """The digest guards against accidents; a file that is no program must still not crash the process."""
    from hashlib import sha256

    damage_program(toy_copy, lambda data: data[:size_bytes])
    data = (toy_copy / "program.pte").read_bytes()
    manifest = json.loads((toy_copy / "manifest.json").read_text())
    manifest.update(program_sha256=sha256(data).hexdigest(), program_bytes=len(data))
    del manifest["seal"]
    (toy_copy / "manifest.json").write_bytes(sealed(manifest))
    assert "compile" in refused("run", toy_copy, "-p", "hi")


def test_standard_input_that_is_no_text(refused, toy_program_dir, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "standard input: is not text" in refused("run", toy_program_dir, "-p", "-")


def test_a_terminal_that_cannot_show_the_text(toy_program_dir):
    done = subprocess.run(
        [sys.executable, "-m", "doubleweave.cli", "run", toy_program_dir, "-p", "hi", "-n", "40"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


INTERRUPTED = """
import os, signal, sys
from doubleweave.cli.main import main
from doubleweave.runtime.llm.session import Session
real, calls = Session.append, []
def append(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return real(self, *args, **kwargs)
Session.append = append
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_while_generating(toy_program_dir):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "run", toy_program_dir, "-p", "hi", "-n", "200"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.split() == ["doubleweave:", "interrupted"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_goes_away_is_no_error(toy_program_dir):
    process = subprocess.Popen(
        [sys.executable, "-m", "doubleweave.cli", "run", toy_program_dir, "-p", "hi", "-n", "200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
