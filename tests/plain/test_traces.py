"""Timelines of task graphs, as Chrome traces and back, as files and as pictures."""

from __future__ import annotations

import json
import os
import random
import re

import numpy as np
import pytest

import toys
from doubleweave.errors import InputError
from doubleweave.ir.split import rows
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.makers import make
from doubleweave.schedule.simulate import times
from doubleweave.schedule.task_graph import build
from doubleweave.timeline.chrome_format import from_chrome, to_chrome
from doubleweave.timeline.compare import compare, comparison_text
from doubleweave.timeline.from_tasks import timeline_of
from doubleweave.timeline.timeline import Timeline
from doubleweave.timeline.trace_file import check_path, read_trace, write_trace
from mutations import other_json


def run(
    num_chunks: int = 3, workers=("npu", "cpu"), name: str = "out_of_order", num_layers: int = 2
) -> Timeline:
    graph = build(
        toys.split(num_layers, rows(1, 8), static_device="npu"),
        cut(8 * num_chunks - 3, rows(1, 8)),
        "last",
        4,
    )
    costs = toys.unit_costs(graph)
    schedule = make(name, graph, workers, costs)
    return timeline_of(graph, schedule, *times(graph, schedule, costs), "a title", 100)


def test_links_go_from_writers_to_readers_on_other_workers():
    timeline = run()
    assert timeline.links
    for earlier, later in timeline.links:
        a, b = timeline.events[earlier], timeline.events[later]
        assert a.worker != b.worker
        assert a.end_ns <= b.start_ns
        assert {a.device, b.device} == {"npu", "cpu"}
    read = {(timeline.events[later].call, timeline.events[later].chunk) for _, later in timeline.links}
    assert {("attention_0", 2), ("block_1", 2)} <= read


def test_counters_follow_the_cache_and_the_buffers():
    timeline = run()
    cache, buffers = timeline.counters
    tokens = 8 * 3 - 3
    row = 2 * 2 * 8 * 4  # keys and values of two layers, 8 floats
    assert cache.samples[0] == (0, 100 * row)
    assert cache.samples[-1][1] == (100 + tokens) * row
    assert [value for _, value in cache.samples] == sorted(value for _, value in cache.samples)
    assert buffers.samples[-1][1] == 0
    assert max(value for _, value in buffers.samples) > 0
    assert min(value for _, value in buffers.samples) >= 0


def test_chrome_traces_read_back():
    timeline = run()
    assert from_chrome(json.loads(json.dumps(to_chrome(timeline))), "here") == timeline


def test_chrome_traces_have_tracks_colours_arrows_and_counters():
    timeline = run()
    events = to_chrome(timeline)["traceEvents"]
    by_phase = {phase: [event for event in events if event["ph"] == phase] for phase in "MXsfC"}
    names = [event["args"]["name"] for event in by_phase["M"]]
    assert names == ["a title", "worker 0 npu", "worker 1 cpu"]
    assert len(by_phase["X"]) == len(timeline.events)
    for event, item in zip(timeline.events, by_phase["X"], strict=True):
        assert (item["tid"], item["ts"], item["dur"]) == (
            event.worker,
            event.start_ns / 1e3,
            event.duration_ns / 1e3,
        )
    colours = {(item["args"]["chunk"], item["cname"]) for item in by_phase["X"]}
    assert len(colours) == len({chunk for chunk, _ in colours}) == len({colour for _, colour in colours}) == 3
    assert len(by_phase["s"]) == len(by_phase["f"]) == len(timeline.links)
    for begin, end in zip(by_phase["s"], by_phase["f"], strict=True):
        assert begin["id"] == end["id"]
        assert begin["ts"] <= end["ts"]
        assert begin["tid"] != end["tid"]
    assert {event["name"] for event in by_phase["C"]} == {"KV cache (bytes)", "buffers in flight (bytes)"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("otherData"), "is no trace of doubleweave"),
        (
            lambda data: data["otherData"].update(format="doubleweave timeline 0"),
            "is no trace of doubleweave",
        ),
        (lambda data: data.pop("traceEvents"), "is a damaged trace"),
        (lambda data: data["otherData"].pop("links"), "is a damaged trace"),
        (lambda data: data["traceEvents"][3].pop("args"), "is a damaged trace"),
        (
            lambda data: data["traceEvents"][3].update(ts=float("inf")),
            "is a damaged trace .OverflowError: cannot",
        ),
        (
            lambda data: data["otherData"].update(num_workers=1),
            "is a damaged trace .ValueError: 1 workers are",
        ),
        (
            lambda data: data["otherData"].update(num_workers=10**9),
            "is a damaged trace .ValueError: 1000000000 w",
        ),
    ],
)
def test_what_is_no_trace(damage, message):
    data = to_chrome(run())
    damage(data)
    with pytest.raises(InputError, match=f"here: {message}"):
        from_chrome(data, "here")


def test_damaged_data_is_refused_in_one_line_or_compared():
    whole = to_chrome(run())
    dice, refusals = random.Random(int(os.environ.get("DAMAGE_SEED", "0"))), []
    for _ in range(int(os.environ.get("NUM_DAMAGES", "300"))):
        try:
            comparison_text(compare(from_chrome(whole, "a"), from_chrome(other_json(whole, dice), "b")))
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    assert not any("\n" in refusal for refusal in refusals)


@pytest.mark.parametrize("extension", ["json", "svg", "png"])
def test_files_are_written_whole(tmp_path, extension, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"run.{extension}"
    write_trace(run(), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full disk")))
    with pytest.raises(OSError, match="full disk"):
        write_trace(run(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_trace_file_reads_back(tmp_path):
    write_trace(run(), tmp_path / "run.json")
    assert read_trace(tmp_path / "run.json") == run()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run.pdf", "found 'run.pdf', expected a file name that ends in .json .* .svg or .png"),
        ("run", "found 'run', expected a file name"),
        ("nowhere/run.json", "folder .*nowhere does not exist; make it first"),
    ],
)
def test_files_that_cannot_be_written(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        check_path(tmp_path / name)


def svg(tmp_path, timeline: Timeline) -> str:
    write_trace(timeline, tmp_path / "run.svg")
    return (tmp_path / "run.svg").read_text()


def test_a_picture_says_what_it_shows(tmp_path):
    pytest.importorskip("matplotlib")
    text = svg(tmp_path, run())
    shown = set(re.findall(r">([^<>]+)</text>", text))
    assert {"worker 0 (npu)", "worker 1 (cpu)", "chunk 0", "chunk 2", "static segment", "attention"} <= shown
    assert {"time (ms)", "memory (MiB)", "KV cache", "buffers in flight"} <= shown
    assert "a title: 0.0 ms" in shown
    assert svg(tmp_path, run()) == text  # the same file every time


def test_a_picture_of_many_chunks_and_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    text = svg(tmp_path, run(64, ("npu", "cpu", "cpu", "cpu"), num_layers=6))
    assert "chunk 9 (colours repeat, 64 chunks)" in text
    assert "worker 3 (cpu)" in text
    assert "time (ms)" in svg(tmp_path, Timeline((), 1))


def test_without_matplotlib_a_picture_is_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(
        InputError, match=r"matplotlib is missing; install it with: pip install 'doubleweave\[plot\]'"
    ):
        write_trace(run(), tmp_path / "run.png")
    assert not list(tmp_path.iterdir())


def test_times_are_those_of_the_run():
    timeline = run()
    assert timeline.makespan_s == pytest.approx(max(event.end_ns for event in timeline.events) / 1e9)
    assert [event.start_ns for event in timeline.events] == sorted(
        event.start_ns for event in timeline.events
    )
    assert np.isclose(sum(timeline.busy_s(worker) for worker in range(2)), len(timeline.events) * 1e-6)
