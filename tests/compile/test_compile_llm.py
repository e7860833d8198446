"""Compiling, through the command line: what it refuses, and that nothing is lost or left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

import toys
from doubleweave.errors import LowerError

pytestmark = pytest.mark.usefixtures("lowered_once")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return toys.save_hugging_face(tmp_path_factory.mktemp("source") / "toy")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_compiles_a_folder_over_an_older_program(cli, source, toy_copy, toy_program):
    import doubleweave

    wanted = toy_program.generate("same", 12)
    (toy_copy / "program.pte").write_bytes(b"of an older version")
    code, out, err = cli("compile", source, "-o", toy_copy, "--quantize", "none", "--chunk", 32, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out.splitlines()[-1])
    assert report["program"] == str(toy_copy)
    assert (report["quantize"], report["segments"], report["calls"]) == ("none", 8, 10)
    assert report["program_bytes"] == (toy_copy / "program.pte").stat().st_size
    assert report["seconds"] > 0
    assert doubleweave.open(toy_copy).generate("same", 12).token_ids == wanted.token_ids
    assert [path.name for path in toy_copy.parent.iterdir()] == [toy_copy.name]
    assert {path.name for path in toy_copy.iterdir()} == {
        "program.pte",
        "manifest.json",
        "run.json",
        "tokenizer.json",
    }


def test_scores_are_kept_and_shown(cli, source, tmp_path, monkeypatch):
    import doubleweave
    from doubleweave.entries import score_compiled
    from doubleweave.ir.text_score import together
    from doubleweave.measure.perplexity import score

    texts = {name: text[:300] for name, text in score_compiled.held_out_texts().items()}
    monkeypatch.setattr(score_compiled, "held_out_texts", lambda: texts)
    monkeypatch.setattr(score_compiled, "calibration_text", lambda: "a text that scales are found on " * 5)
    code, out, _ = cli("compile", source, "-o", tmp_path / "out", "--quantize", "8da8w", "--score")
    assert code == 0
    program = doubleweave.open(tmp_path / "out")
    scores = program.manifest.scores
    assert [each.text for each in scores] == ["calibration", *texts]
    exact = doubleweave.compile_llm(source, tmp_path / "exact", quantize="none")
    assert exact.scores == ()
    session = doubleweave.open(tmp_path / "exact").session()
    for each in scores[1:]:
        wanted = score(program, program.session(), texts[each.text], exact=session)
        assert (each.nll, each.exact_nll) == pytest.approx((wanted.nll, wanted.exact_nll), rel=1e-4)
        assert (each.kl, each.top1) == pytest.approx((wanted.kl, wanted.top1), rel=0.05, abs=1e-4)
    whole = together("all held out", scores[1:])
    assert f"{whole.over:+.2%}" in out
    assert f"{whole.kl:.4f}" in cli("inspect", tmp_path / "out")[1]
    found = json.loads(cli("inspect", tmp_path / "out", "--json")[1].splitlines()[-1])["scores"]
    assert [each["top1"] for each in found] == [each.top1 for each in scores]


def test_a_model_without_a_tokenizer_has_no_scores(refused, tmp_path):
    toys.module().save_pretrained(tmp_path / "bare")
    message = refused("compile", tmp_path / "bare", "-o", tmp_path / "out", "--score")
    assert "has no tokenizer that can be read; leave it out" in message
    assert not (tmp_path / "out").exists()


def test_a_program_is_readable_by_others_as_any_new_folder(toy_program_dir, tmp_path):
    (tmp_path / "new").mkdir()
    assert toy_program_dir.stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quantize", "q4_0"], "quantize: found 'q4_0', expected one of 8da8w, 8da4w, none"),
        (["--shape", "round"], "shape: found 'round', expected one of bounded, static"),
        (["--chunk", 0], "chunk: found 0, expected 1 to 4096 tokens"),
        (["--chunk", 32, "--chunk", -1], "chunk: found -1"),
        (["--shape", "static", "--chunk", 5000], "chunk: found 5000, expected 1 to 4096 tokens"),
        (["--max-context", 0], "max-context: found 0, expected 1 to 256 (what the model was trained for)"),
        (["--max-context", 257], "max-context: found 257, expected 1 to 256"),
    ],
)
def test_options_that_make_no_sense(refused, source, tmp_path, argv, message):
    assert message in refused("compile", source, "-o", tmp_path / "out", *argv)
    assert not list(tmp_path.iterdir())


def test_sources_that_cannot_be_read(refused, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "folder").mkdir()
    for name, mend in (
        ("model.gguf", "fetch it again"),
        ("folder", "config.json"),
        ("nothing", "or an alias"),
    ):
        assert mend in refused("compile", tmp_path / name, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.gguf"]


def test_folders_that_are_not_ours_to_write(refused, source, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    assert "is a file, expected a folder to write" in refused("compile", source, "-o", tmp_path / "file")
    assert "is a folder with other files in it" in refused("compile", source, "-o", tmp_path / "folder")
    assert "cannot be made" in refused("compile", source, "-o", tmp_path / "file" / "below")
    assert "cannot be made" in refused("compile", source, "-o", "/proc/doubleweave")
    assert contents(tmp_path) == {"file": b"precious", "folder/thesis.tex": b"precious"}


def test_a_program_folder_with_other_files_keeps_them(refused, source, toy_copy):
    (toy_copy / "notes.txt").write_text("precious")
    before = contents(toy_copy)
    assert "other files" in refused("compile", source, "-o", toy_copy)
    assert contents(toy_copy) == before


@pytest.fixture
def quick_lowering(monkeypatch):
    """Lowering replaced by writing some bytes, for tests of what happens around it."""
    from doubleweave.compiler.lower import lower

    def write(torch_split, path, progress):
        path.write_bytes(bytes(300_000))
        return lower.Lowering(torch_split.split, "0" * 64, {})

    monkeypatch.setattr(lower, "lower", write)


def limit_file_size(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def test_a_disk_that_is_full(refused, quick_lowering, source, toy_copy):
    """Files past a size fail as on a full disk; /dev/full itself is in test_pte.py."""
    before = contents(toy_copy)
    limit_file_size(100_000)
    try:
        line = refused("compile", source, "-o", toy_copy, "--quantize", "none")
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert "cannot be written" in line
    assert "with -o" in line
    assert contents(toy_copy) == before
    assert [path.name for path in toy_copy.parent.iterdir()] == [toy_copy.name]


@pytest.mark.parametrize(
    "error", [Exception("No space left on device (os error 28)"), OSError(28, "No space left on device")]
)
def test_a_tokenizer_that_cannot_be_written(quick_lowering, tmp_path, error):
    """tokenizers raises a plain Exception for what Rust's write says."""
    from dataclasses import replace

    import doubleweave

    def save(folder):
        raise error

    with pytest.raises(
        LowerError, match=r"cannot be written: .*No space left on device.*; choose another folder"
    ):
        doubleweave.compile_llm(replace(toys.model(), save_tokenizer=save), tmp_path / "out", quantize="none")
    assert not list(tmp_path.iterdir())


def _fail(graph_module, over, segment, methods):
    raise RuntimeError(f"cannot do {segment.name}\nand more lines")


def test_a_failing_segment_is_named(monkeypatch, tmp_path):
    import doubleweave
    from doubleweave.compiler.lower import lower

    monkeypatch.setattr(lower, "lower_graph", _fail)
    with pytest.raises(
        LowerError, match=r"segment \w+: \w+ cannot lower it \(RuntimeError: cannot do \w+\)$"
    ):
        doubleweave.compile_llm(toys.model(), tmp_path / "out", quantize="none")
    assert not list(tmp_path.iterdir())


def children(pid: int) -> set[int]:
    try:
        return {
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        }
    except (FileNotFoundError, ProcessLookupError):
        return set()


def group(leader: int) -> set[int]:
    """The processes of a group that have not ended."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(process_group) == leader and state != "Z":
            found.add(int(stat.parent.name))
    return found


@contextmanager
def lowering(source: Path, folder: Path):
    """A process that compiles into the folder, once it has forked others to lower; killed with them at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "doubleweave.cli", "compile", source, "-o", folder, "--quantize", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal interrupts the whole group
    )
    try:
        forked: set[int] = set()
        deadline = time.monotonic() + 120
        while not forked and process.poll() is None and time.monotonic() < deadline:
            forked = children(process.pid)
            time.sleep(0.01)
        assert forked, process.communicate()
        yield process
    finally:
        for pid in group(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


in_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")


@in_proc
def test_a_kill_leaves_no_process_and_the_next_compile_removes_its_folder(source, toy_copy):
    import doubleweave

    before = contents(toy_copy)
    with lowering(source, toy_copy) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 30
        while group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not group(process.pid)
    (left,) = set(toy_copy.parent.iterdir()) - {toy_copy}
    assert left.name.startswith(f".{toy_copy.name}.")
    assert contents(toy_copy) == before
    doubleweave.compile_llm(source, toy_copy, quantize="none")
    assert [path.name for path in toy_copy.parent.iterdir()] == [toy_copy.name]


@in_proc
def test_ctrl_c_while_lowering(source, toy_copy):
    before = contents(toy_copy)
    with lowering(source, toy_copy) as process:
        assert len(list(toy_copy.parent.iterdir())) == 2  # it is written beside
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
        left = group(process.pid)
    assert process.returncode == 130, err
    assert [line for line in err.splitlines() if line.strip()] == ["doubleweave: interrupted"]
    assert out == ""
    assert contents(toy_copy) == before
    assert [path.name for path in toy_copy.parent.iterdir()] == [toy_copy.name]
    assert not left
