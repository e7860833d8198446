"""What the native module refuses is a DoubleweaveError wherever a program is loaded, bound or run."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import doubleweave as dw
import toys
from doubleweave import _native
from doubleweave.errors import DoubleweaveError, RunError
from doubleweave.runtime.native_errors import as_run_errors

TOKENS = np.random.default_rng(7).integers(0, toys.VOCAB_SIZE, 60)


def test_errors_of_the_native_module_are_run_errors():
    with (
        pytest.raises(RunError, match=r"^method 'm' failed in aten.embedding: Check failed$"),
        as_run_errors(),
    ):
        raise _native.Error(
            "method 'm' failed: Check failed.; KernelCall failed in operator aten::embedding.out"
        )
    assert not issubclass(_native.Error, DoubleweaveError)


@pytest.mark.parametrize("name", ["Execution", "Buffers", "KvCache"])
def test_what_is_refused_while_a_session_is_prepared(toy_program, monkeypatch, name):
    def refuse(*args):
        raise _native.Error("no memory")

    monkeypatch.setattr(_native, name, refuse)
    with pytest.raises(RunError, match="no memory"):
        toy_program.session().append(TOKENS)


@pytest.mark.parametrize("name", ["Execution", "Buffers"])
def test_what_is_refused_while_a_method_is_prepared(toy_program, monkeypatch, name):
    def refuse(*args):
        raise _native.Error("no memory")

    method = toy_program.methods["lm_head"]
    x = np.zeros((1, 3, *map(int, method.function.inputs[0].shape[2:])), np.float32)
    monkeypatch.setattr(_native, name, refuse)
    with pytest.raises(RunError, match="no memory"):
        method(x[:, : 1 + (name == "Buffers")])


def test_a_damaged_program(toy_program, tmp_path):
    folder = tmp_path / "program"
    shutil.copytree(toy_program.folder, folder)
    data = (folder / "program.pte").read_bytes()
    (folder / "program.pte").write_bytes(data[: len(data) // 3])
    with pytest.raises(DoubleweaveError):
        dw.open(folder).session().append(TOKENS)
