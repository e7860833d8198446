"""With each safeguard of the loaders switched off, the check that ends compile refuses the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import doubleweave as dw
import toys
from doubleweave.sources import gguf_rotary, hugging_face
from gguf_files import HEADS, HIDDEN, module_of, write

pytestmark = pytest.mark.usefixtures("lowered_once")

DOWN = "model.layers.1.mlp.down_proj.weight"
FACTORS = {"rope_freqs.weight": np.linspace(1, 8, HIDDEN // HEADS // 2, dtype=np.float32)}


def refused(source: Path, out: Path) -> str:
    with pytest.raises(dw.CheckError) as error:
        dw.compile_llm(source, out, quantize="none")
    assert not out.exists()
    assert "nothing was written" in str(error.value)
    return str(error.value)


def test_a_folder_without_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys.module().save_pretrained(tmp_path / "toy")
    path = tmp_path / "toy" / "model.safetensors"
    save_file(
        {name: value for name, value in load_file(path).items() if name != DOWN}, path, {"format": "pt"}
    )
    monkeypatch.setattr(hugging_face, "check_loaded", lambda *arguments: None)
    assert f"{DOWN}: loaded, but in none of the files" in refused(tmp_path / "toy", tmp_path / "out")


def test_a_gguf_file_whose_frequency_factors_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.gguf", module_of(), tensors=FACTORS)
    monkeypatch.setattr(gguf_rotary, "apply_frequency_factors", lambda *given: None)
    assert "the rotary frequencies (model.rotary_emb.inv_freq) differ" in refused(path, tmp_path / "out")


def test_a_gguf_file_whose_rotary_scaling_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.gguf", module_of(), keys={"rope.scaling.factor": 2.0})
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    monkeypatch.setattr(gguf_rotary, "rope_parameters", lambda *given: plain)
    assert "the rotary frequencies" in refused(path, tmp_path / "out")
