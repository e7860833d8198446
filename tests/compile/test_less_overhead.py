"""What is kept out of the way while something is compiled changes no program, and is put back."""

from __future__ import annotations

import gc
import hashlib
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import fx
from torch._export import utils
from torch.export import exported_program
from torch.fx.experimental.sym_node import SymNode
from torch.fx.traceback import NodeSource

import doubleweave as dw
import toys
from doubleweave.compiler import less_overhead
from doubleweave.compiler.less_overhead import on_wide_frame, with_less_overhead
from doubleweave.compiler.lower import lower

EVERY_DEVICE = [torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA, torch._C.DispatchKey.Meta]


def test_programs_are_the_same_without_it(
    toy_8da8w_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lower, "unchanged_graphs_kept", nullcontext)  # and with it what remembers results
    monkeypatch.setattr(less_overhead, "_operators_listed_once", nullcontext)
    monkeypatch.setattr(less_overhead, "_operators_of_the_cpu", nullcontext)
    monkeypatch.setattr(less_overhead, "_sizes_computed_once", nullcontext)
    monkeypatch.setattr(less_overhead, "_nodes_without_copies_and_traces", nullcontext)
    monkeypatch.setattr(less_overhead, "code_made_when_called", nullcontext)
    dw.compile_llm(toys.model(), tmp_path / "out", quantize="8da8w", chunk=(32,), check=False)
    one, other = (hashlib.sha256((f / "program.pte").read_bytes()) for f in (toy_8da8w_dir, tmp_path / "out"))
    assert one.digest() == other.digest()


@pytest.fixture
def nothing_frozen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(less_overhead, "_is_frozen", False)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_all_is_put_back(monkeypatch: pytest.MonkeyPatch):
    make, add = utils._materialize_cpp_cia_ops, SymNode._add
    monkeypatch.setattr(exported_program, "_BACKEND_KEYS_TO_OVERRIDE", every := list(EVERY_DEVICE))
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()

    @with_less_overhead
    def outer():
        assert gc.get_freeze_count() > 100_000
        assert utils._materialize_cpp_cia_ops is not make
        assert SymNode._add is not add
        assert len(exported_program._BACKEND_KEYS_TO_OVERRIDE) == 2
        assert fx.config.do_not_emit_stack_traces
        assert hasattr(NodeSource, "__deepcopy__")
        inner()
        assert gc.get_freeze_count() > 100_000
        raise ValueError("as given")

    @with_less_overhead
    def inner():
        pass

    with pytest.raises(ValueError, match="as given"):
        outer()
    assert (utils._materialize_cpp_cia_ops, SymNode._add) == (make, add)
    assert exported_program._BACKEND_KEYS_TO_OVERRIDE is every
    assert not fx.config.do_not_emit_stack_traces
    assert not hasattr(NodeSource, "__deepcopy__")
    assert (gc.get_threshold(), gc.get_freeze_count()) == (threshold, frozen)


def test_a_wide_frame_is_a_call():
    def depth(number: int) -> int:
        return number and 1 + depth(number - 1)

    @on_wide_frame
    def called(a: int, *, b: int) -> tuple[int, int, int]:
        return a, b, depth(sys.getrecursionlimit() // 2)

    assert called(1, b=2) == (1, 2, sys.getrecursionlimit() // 2)
    assert called.__name__ == "called"


def test_another_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(utils, "_materialize_cpp_cia_ops")
    assert with_less_overhead(lambda: 7)() == 7
