"""A backend is one record: made here, registered, offered, compiled for and run, with nothing else touched."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import doubleweave as dw
import toys
from doubleweave.compiler import backends as registry
from doubleweave.compiler.backends import backends, find_backend, llm_backends, own_options, register
from doubleweave.compiler.backends.backend import Backend, Option
from doubleweave.errors import LowerError, PolicyError

MARKER = Option("marker", "what its segments are compiled for", default="plain", choices=("plain", "Striped"))


def place(torch_split, options, chunks, report):
    """Everything that the default backend would get."""
    segments = [
        replace(segment, backend="toy", target=options.own["marker"], recipe=options.recipe)
        if segment.backend == "xnnpack"
        else segment
        for segment in torch_split.split.segments
    ]
    return replace(torch_split, split=replace(torch_split.split, segments=tuple(segments)))


@pytest.fixture
def toy(monkeypatch):
    """A backend whose programs are the portable backend's."""
    monkeypatch.setattr(registry, "_registered", {})

    def to_edge(exported, target, recipe):
        assert (target, recipe) == ("Striped", "exact")
        return backends()["portable"].to_edge(exported, "", "")

    backend = Backend(
        "toy",
        to_edge,
        about="any toy",
        recipes={"exact": "float32"},
        options=(MARKER,),
        place=place,
        way_out="leave {} out",
    )
    register(backend)
    return backend


def test_a_backend_from_outside_compiles_and_runs(toy, toy_program, tmp_path, cli):
    manifest = dw.compile_llm(toys.model(), tmp_path / "toy", backend="toy", marker="striped", chunk=(32,))
    found = manifest.split.segments_of("toy")
    assert {segment.name for segment in found} >= {"block_0", "lm_head"}
    assert all((segment.target, segment.recipe) == ("Striped", "exact") for segment in found)
    assert not any(segment.num_delegated for segment in manifest.split.segments)
    assert manifest.model.quantize == "exact"
    ids = np.random.default_rng(0).integers(0, toys.VOCAB_SIZE, 45)
    for schedule in ("sequential", "wavefront", "auto"):
        expected, result = (
            program.session(schedule, 2).append(ids) for program in (toy_program, dw.open(tmp_path / "toy"))
        )
        assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max()
    code, out, _ = cli("inspect", tmp_path / "toy")
    assert (code, "toy" in out) == (0, True)


def test_a_segment_that_it_refuses_comes_with_the_way_out(toy, tmp_path):
    def refuse(exported, target, recipe):
        raise LowerError("no such toy")

    registry._registered["toy"] = replace(toy, to_edge=refuse)
    with pytest.raises(LowerError, match=r"^segment (\w+): no such toy; leave \1 out$"):
        dw.compile_llm(toys.model(), tmp_path / "toy", backend="toy", marker="Striped")
    assert not list(tmp_path.iterdir())


def test_the_command_line_offers_it(toy, cli):
    code, out, _ = cli("doctor")
    assert (code, "backend toy: works" in out) == (0, True)
    text = " ".join(help_of_compile().split())
    assert "openvino (Intel's chips) or toy (any toy); see doubleweave doctor" in text
    assert "toy: exact (default; float32)" in text
    assert "--marker" in text
    assert "toy: what its segments are compiled for" in text


def test_its_options_are_flags(toy, cli, tmp_path):
    def says(*argv):
        code, _, err = cli("compile", "smollm2", "-o", tmp_path / "out", *argv)
        return code, err.splitlines()[-1]

    sentence = "doubleweave: marker: is an option of the toy backend; add backend toy or leave it out"
    assert says("--marker", "striped") == (2, sentence)
    assert says("--backend", "toy", "--marker", "dotted") == (
        2,
        "doubleweave: marker: found 'dotted', expected one of plain, Striped",
    )
    code, line = says("--keep", "cpu")
    assert code == 2
    assert "argument --keep: found 'cpu', expected PATTERN=FORMAT, such as 'down=int8'" in line


def help_of_compile() -> str:
    import argparse

    from doubleweave.cli.compile import add_compile

    commands = argparse.ArgumentParser().add_subparsers()
    add_compile(commands)
    return commands.choices["compile"].format_help()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"marker": "striped"}, "marker: is an option of the toy backend; add backend toy or leave it out"),
        (
            {"backend": "toy", "marker": "dotted"},
            "marker: found 'dotted', expected one of plain, Striped",
        ),
        (
            {"backend": "toy", "quantize": "8w"},
            "quantize: found '8w', expected one of exact for toy",
        ),
        (
            {"backend": "toy", "soc": "SM8650"},
            "soc: is an option of the qnn backend; add backend qnn or leave it out",
        ),
        (
            {"backend": "toy", "mark": "striped"},
            "mark: is no option of a backend or a source; expected one of keep, soc, calibrate, budget, emulate, "
            "attention_device, device, marker, params, tokenizer, adapter, trust_remote_code",
        ),
        ({"backend": "portable"}, "backend: found 'portable', expected one of xnnpack, qnn, openvino, toy"),
    ],
)
def test_options_that_do_not_go_together_are_refused(toy, tmp_path, options, sentence):
    with pytest.raises(PolicyError) as caught:
        dw.compile_llm(toys.model(), tmp_path / "out", **options)
    assert str(caught.value) == sentence
    assert not list(tmp_path.iterdir())


def test_own_options_have_their_defaults(toy):
    assert own_options(toy, "dynamic", {}) == {"marker": "plain"}
    assert own_options(toy, "dynamic", {"soc": None, "keep": {}, "emulate": False}) == {"marker": "plain"}
    with pytest.raises(PolicyError, match="keep: found 'a=b', expected a dict of PATTERN=RECIPE"):
        own_options(backends()["qnn"], "dynamic", {"keep": "a=b"})


def test_a_name_is_given_once(toy):
    for name in ("toy", "qnn"):
        with pytest.raises(PolicyError, match=f"backend '{name}': is there already; give it another name"):
            register(replace(toy, name=name))


def test_the_packages_of_the_folder_are_the_backends():
    assert list(backends()) == ["xnnpack", "portable", "qnn", "openvino"]
    assert list(llm_backends()) == ["xnnpack", "qnn", "openvino"]
    folder = Path(registry.__file__).parent
    assert set(backends()) == {path.parent.name for path in folder.glob("*/__init__.py")}
    assert all(name == backend.name for name, backend in backends().items())
    assert {name for name, backend in backends().items() if backend.library.is_npu} == {"qnn", "openvino"}
    with pytest.raises(PolicyError, match="backend: found 'npu', expected one of xnnpack, qnn, openvino"):
        find_backend("npu", llm_backends())


def test_listing_backends_imports_neither_torch_nor_executorch():
    code = """
import sys
for absent in ("torch", "executorch", "transformers", "doubleweave._native"):
    sys.modules[absent] = None
from doubleweave.cli.main import main
main(["compile", "--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--attention-device" in done.stdout


def names_in_code(path: Path, names: re.Pattern[str]) -> set[str]:
    """The backends that a file's code names: in identifiers, imports and strings that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) not in docstrings:
            texts = (value for _, value in ast.iter_fields(node) if isinstance(value, str))
            found.update(match for text in texts for match in names.findall(text))
    return found


def test_nothing_else_names_a_backend():
    package = Path(dw.__file__).parent
    names = re.compile("|".join(backends()))
    found = {
        str(path.relative_to(package)): names_in_code(path, names)
        for path in package.rglob("*.py")
        if not path.is_relative_to(package / "compiler" / "backends")
        and not path.is_relative_to(package / "vendors")
    }
    assert {path: named for path, named in found.items() if named} == {
        "compiler/policy.py": {"xnnpack", "portable"}  # the defaults
    }
