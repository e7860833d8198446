"""Layers with a window keep the rows that it shows, in a ring of pages, and no others."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import doubleweave as dw
import toys
from doubleweave.errors import InputError, RunError, ScheduleError
from doubleweave.schedule.chunks import Chunk
from doubleweave.schedule.pattern import pattern_of
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import build
from doubleweave.schedule.verify import verify

pytestmark = pytest.mark.usefixtures("lowered_once")
WINDOW, CHUNK, CONTEXT = 24, 16, 1024
IDS = np.random.default_rng(7).integers(0, toys.VOCAB_SIZE, 600)


def module():
    """Two layers with a window around one that sees everything."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=toys.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=28,  # in int8 a row has 64 bytes, so that a ring has whole pages at every 64 rows
        sliding_window=WINDOW,
        max_position_embeddings=CONTEXT,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module", params=["float32", "int8"])
def folder(request, made_once):
    def make(target):
        model = replace(toys.model(), module=module(), max_context=CONTEXT)
        dw.compile_llm(model, target, quantize="none", chunk=(CHUNK,), cache=request.param)

    return made_once(f"window_{request.param}", make)


@pytest.fixture(scope="module")
def wanted():
    """The source's logits of all tokens, [T, vocab]."""
    with torch.no_grad():
        return module()(input_ids=torch.from_numpy(IDS)[None], use_cache=False).logits[0].numpy()


def close(found, wanted, folder):
    bound = 2e-4 if "float32" in str(folder) else 0.05
    return np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


def values_of(program):
    return {value.name: value for value in program.split.values if value.kind == "cache"}


def test_values_say_their_window(folder):
    windows = {name: value.window for name, value in values_of(dw.open(folder)).items()}
    assert windows == {"k_0": WINDOW, "v_0": WINDOW, "k_1": 0, "v_1": 0, "k_2": WINDOW, "v_2": WINDOW}


@pytest.mark.parametrize("schedule", ["sequential", "wavefront", "out_of_order", "lockstep"])
def test_a_long_text_gives_the_source_s_logits(folder, wanted, schedule):
    session = dw.open(folder).session(schedule=schedule)
    assert close(session.score(IDS[:500]), wanted[:500], folder)
    for at in range(500, 520):
        assert close(session.append(IDS[at : at + 1]), wanted[at], folder)
    assert close(session.score(IDS[520:600]), wanted[520:], folder)


def test_memory_stays_that_of_the_window(folder):
    program = dw.open(folder)
    session = program.session()
    ring_bytes = whole_bytes = 0
    for value in values_of(program).values():
        step = 4096 // np.gcd(4096, value.row_bytes)
        ring = -(-(WINDOW + CHUNK) // step) * step * value.row_bytes
        ring_bytes += ring if value.window else 0
        whole_bytes += 0 if value.window else value.row_bytes
    for end in (300, 600):
        session.append(IDS[end - 300 : end])
        pages = session.kv_bytes - ring_bytes - end * whole_bytes
        assert 0 <= pages <= 2 * 2 * 4096 + CHUNK * whole_bytes
    session.reset()
    assert session.kv_bytes == 0


def test_going_back_as_far_as_the_window_allows(folder, wanted):
    session = dw.open(folder).session()
    session.append(IDS[:500])
    with pytest.raises(
        InputError, match=r"truncate: found 100, expected 0 or \d+ to 500: layers with a window"
    ):
        session.truncate(100)
    assert session.length == 500
    least = session._cache.least_length
    # Two chunks were written behind that token at most; rows of the ring fill whole pages.
    assert 0 < least <= 500 - CHUNK // 2
    with pytest.raises(InputError, match="expected 0 or"):
        session.truncate(least - 1)
    session.truncate(least)
    assert close(session.score(IDS[least:520]), wanted[least:520], folder)
    session.truncate(0)
    assert close(session.score(IDS[:40]), wanted[:40], folder)


def test_a_short_text_goes_back_anywhere(folder, wanted):
    session = dw.open(folder).session()
    session.append(IDS[:40])
    session.truncate(3)
    assert close(session.score(IDS[3:100]), wanted[3:100], folder)


def test_a_run_that_fails_may_cost_what_the_window_showed(folder, wanted, monkeypatch):
    session = dw.open(folder).session()
    session.append(IDS[:200])

    @contextmanager
    def interrupted(*_):
        yield
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("doubleweave.runtime.llm.session.watching", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.append(IDS[200:500])
    assert session.length == 200
    with pytest.raises(RunError, match="reset the session and append them again"):
        session.append(IDS[200:210])
    session.reset()
    assert close(session.score(IDS[:210]), wanted[:210], folder)


def test_without_python(folder, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps(IDS[:500].tolist()))
    runner = Path(sys.executable).parent / "doubleweave-run"
    command = [runner, folder, "--token-ids", tmp_path / "ids.json", "-n", "40", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["token_ids"]
    assert tuple(found) == dw.open(folder).generate(IDS[:500], max_new_tokens=40).token_ids


def test_a_schedule_that_overtakes_a_window_is_refused(folder):
    """Two workers run a chunk each: the second must not append before the first has attended."""
    split = dw.open(folder).split
    chunks = tuple(Chunk(at, CHUNK, CHUNK) for at in (0, CHUNK))
    graph = build(split, chunks, "last", 2)
    assert len(pattern_of(split, "last").body_waits)
    names = [graph.name(task) for task in range(len(graph))]
    writers = {call.name for call in split.calls for name in call.writes if name.startswith("k_")}
    readers = {call.name for call in split.calls for name in call.reads if name == "k_0"}
    waits = {
        (names[task].partition("/")[0], names[before].partition("/")[0])
        for task in range(len(graph))
        for before in graph.after[task]
        if graph.chunk_of[task] == 1 and graph.chunk_of[before] == 0
    }
    first = next(call.name for call in split.calls if "k_0" in call.writes)
    assert first in writers
    assert {(first, reader) for reader in readers} <= waits
    # The independent check asks for it too, whatever the graph says.
    without = replace(graph, after_starts=graph.after_starts * 0, after_list=graph.after_list[:0])
    order = sorted(range(len(graph)), key=lambda task: (graph.chunk_of[task], task))
    lists = [[t for t in order if graph.chunk_of[t] == chunk] for chunk in (0, 1)]
    with pytest.raises(ScheduleError):
        verify(Schedule("two", ("cpu", "cpu"), tuple(map(tuple, lists))), without)
