"""The check of a large model: its first layers as a whole model is checked, then each segment by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import doubleweave as dw
import toys
from doubleweave.compiler.lower import pte_file
from doubleweave.compiler.split import llm_rows
from doubleweave.entries import check_compiled

pytestmark = pytest.mark.usefixtures("lowered_once")

LAYERS = 6


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_compiled, "LARGE_BYTES", 0)


def deep() -> Any:
    return replace(toys.model(), module=toys.module(num_layers=LAYERS))


@pytest.mark.parametrize("recipe", ["none", "8da8w", "8da4w"])
def test_what_is_checked(tmp_path: Path, recipe: str) -> None:
    said: list[str] = []
    made = dw.compile_llm(
        deep(), tmp_path / "out", quantize=recipe, progress=lambda what, done, total: said.append(what)
    )
    check = made.check
    assert check is not None
    assert check.layers == 2
    assert check.source_off is not None
    assert check.weights_noise is not None
    assert check.source_off < 5e-5
    assert check.weights_noise < (1e-4 if recipe == "none" else 0.3)
    assert any(text.startswith("checking 2 layers: ") for text in said)
    assert said[-1] == "checking: the weights of all layers"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json",
        "program.pte",
        "run.json",
        "tokenizer.json",
    }
    assert dw.open(tmp_path / "out").manifest.check == check


def test_the_whole_model_on_request(tmp_path: Path) -> None:
    check = dw.compile_llm(deep(), tmp_path / "out", quantize="none", check="whole").check
    assert check is not None
    assert (check.layers, check.weights_noise) == (0, None)


def test_a_model_whose_layers_all_differ_is_checked_whole(tmp_path: Path) -> None:
    check = dw.compile_llm(toys.model(), tmp_path / "out", quantize="none").check  # three layers
    assert check is not None
    assert check.layers == 0


@pytest.mark.parametrize("recipe", ["none", "8da4w"])
def test_another_layers_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """A layer that the first ones do not show is written with its neighbour's weights."""
    add = pte_file.ProgramWriter.add
    blocks: dict[str, Any] = {}

    def add_wrongly(self: Any, method: Any, weights: Any) -> int:
        blocks[method.name] = weights
        return add(self, method, blocks["block_3"] if method.name == "block_4" else weights)

    monkeypatch.setattr(pte_file.ProgramWriter, "add", add_wrongly)
    with pytest.raises(dw.errors.CheckError, match="segment block_4 of the program gives other numbers than"):
        dw.compile_llm(deep(), tmp_path / "out", quantize=recipe)
    assert not list(tmp_path.iterdir())


def test_a_fault_in_every_layer_is_found_in_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that meet in a layer, which no segment shows by itself."""

    class Meeting(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + x.mean(1, keepdim=True)

    module = toys.module(num_layers=LAYERS)
    for layer in module.model.layers:
        layer.mlp = Meeting(layer.mlp)
    monkeypatch.setattr(llm_rows, "check_rows", lambda *given: None)
    with pytest.raises(dw.errors.CheckError, match="rows meet there"):
        dw.compile_llm(replace(toys.model(), module=module), tmp_path / "out", quantize="none")
    assert not list(tmp_path.iterdir())
