"""Models that keep states between tokens: their splits, programs and sessions against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import architectures
import doubleweave as dw
from doubleweave.compiler.graph import recurrence
from doubleweave.compiler.graph.export_llm import owned_modules
from doubleweave.compiler.split.eager import run_eager
from doubleweave.compiler.split.llm_rows import check_rows
from doubleweave.compiler.split.split_llm import default_policy, split_llm
from doubleweave.errors import CheckError, InputError, RunError
from doubleweave.ir.split import rows
from doubleweave.sources.hugging_face import from_module
from exports import export_llm

pytestmark = pytest.mark.usefixtures("lowered_once")

TOKENS = np.random.default_rng(0).integers(3, 260, 90)


def logits_of(module, ids):
    with torch.no_grad():
        return module(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].numpy()


def off(found, wanted):
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# A convolution; Mamba; Mamba 2; the gated delta rule, with and without experts; Mamba beside attention in each layer.
@pytest.mark.parametrize(
    "name", ["lfm2", "mamba", "mamba2", "falcon_mamba", "olmo_hybrid", "qwen3_next", "falcon_h1"]
)
def test_splits_of_recurrent_models_are_right_in_any_chunks(name):
    module = architectures.tiny_model(name)
    graph = export_llm(module, 128)
    check_rows(graph, name)
    split = split_llm(graph, owned_modules(module), default_policy(rows(1, 128)), max_context=256)
    states = {value.name: value for value in split.split.values if value.kind == "state"}
    recurrences = [segment for segment in split.split.segments if segment.each_row]
    assert recurrences
    assert states
    for state in states:
        (call,) = [call for call in split.split.calls if state in call.reads]
        assert state in call.writes
        assert split.split.segment(call.segment).each_row
    wanted = logits_of(module, TOKENS)
    for chunk in (None, 32, 7, 1):
        found = run_eager(split, torch.tensor(TOKENS)[None], chunk)[0].numpy()
        assert off(found, wanted) < 3e-5, chunk


def test_what_passes_a_recurrence_is_small():
    """Nothing of the size of a state per token, nor a linear's product, is worked out row by row."""
    module = architectures.tiny_model("mamba2")
    split = split_llm(
        export_llm(module, 128), owned_modules(module), default_policy(rows(1, 128)), max_context=256
    ).split
    largest = max(value.row_bytes for value in split.values if value.kind == "state")
    for segment in split.segments:
        if segment.each_row:
            assert segment.linear_weights == 0
    assert all(value.row_bytes < largest for value in split.values if value.kind == "chunk")


@pytest.fixture(scope="module")
def source():
    return architectures.tiny_model("qwen3_next")


@pytest.fixture
def folder(hybrid_dir):
    return hybrid_dir


def test_a_session_goes_back_to_snapshots_alone(source, folder):
    wanted = logits_of(source, TOKENS)
    session = dw.open(folder).session()
    session.append(TOKENS[:21])
    assert session.snapshot() == 21
    session.append(TOKENS[21:40])
    session.append(TOKENS[40:60])
    with pytest.raises(InputError, match="found 30, expected 0, 21, 40 or 60: the model keeps states"):
        session.truncate(30)
    session.truncate(40)
    assert off(session.append(TOKENS[40:70]), wanted[69]) < 1e-4
    session.truncate(21)
    assert off(session.append(TOKENS[21:22]), wanted[21]) < 1e-4
    session.reset()
    assert off(session.append(TOKENS[:9]), wanted[8]) < 1e-4
    session.truncate(0)
    assert off(session.append(TOKENS[:1]), wanted[0]) < 1e-4


def test_a_run_that_ends_early_leaves_states_as_they_were(source, folder, monkeypatch):
    wanted = logits_of(source, TOKENS)
    session = dw.open(folder).session(schedule="sequential")
    session.append(TOKENS[:20])

    class Stopped(Exception):
        pass

    prepared = session._prepare(session._ids, 40, "last")

    class Failing:
        def run(self, base, record):
            prepared.execution.run(base, record)  # all of it: every state has gone on
            raise Stopped

    monkeypatch.setattr(
        session, "_prepare", lambda *_: type(prepared)(**{**vars(prepared), "execution": Failing()})
    )
    monkeypatch.setattr(
        "doubleweave.runtime.llm.session.watching", lambda *_: __import__("contextlib").nullcontext()
    )
    with pytest.raises((Stopped, RunError)):
        session.append(TOKENS[20:60])
    monkeypatch.undo()
    assert session.length == 20
    assert off(session.append(TOKENS[20:50]), wanted[49]) < 1e-4


def test_a_recurrence_that_forgets_is_found_by_the_check(source, tmp_path, monkeypatch):
    """A state that is not carried on is a program that gives other logits from the second token on."""
    from doubleweave.runtime.llm import bind

    binding = bind._native.Binding

    def same_copy(*args, **kwargs):
        return binding(*args, **{**kwargs, "first_copy": 0} if kwargs.get("copy_bytes") else kwargs)

    monkeypatch.setattr(bind._native, "Binding", same_copy)
    with pytest.raises(CheckError, match="from position 1 on"):
        dw.compile_llm(
            from_module(source, "hybrid", None), tmp_path / "out", quantize="none", max_context=128
        )


def test_recurrences_are_marked_once_a_layer():
    module = architectures.tiny_model("lfm2")
    graph = export_llm(module, 8)
    marks = {node.meta["together"] for node in graph.graph.nodes if "together" in node.meta}
    assert marks == {f"{recurrence.RECURRENCE}/0"}


@pytest.mark.parametrize("name", ["minimax", "recurrent_gemma", "zaya"])
def test_states_elsewhere_than_in_cache_layers(name):
    """In a cache of the model's own class, in its modules, and beside attention in one layer."""
    module = architectures.tiny_model(name)
    graph = export_llm(module, 64)
    check_rows(graph, name)
    split = split_llm(graph, owned_modules(module), default_policy(rows(1, 64)), max_context=128)
    ids = torch.randint(3, 260, (1, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = module(input_ids=ids, use_cache=False).logits
    assert any(value.kind == "state" for value in split.split.values)
    for size in (50, 13, 1):
        found = run_eager(split, ids, size)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5
