"""Profiles as TOML: they read back, are written whole, and what is wrong is named in one sentence."""

from __future__ import annotations

import pytest

from doubleweave.errors import InputError
from doubleweave.predict.estimate import Device
from doubleweave.predict.profile import Decision, Measured, Profile
from doubleweave.predict.profile_file import parse_profile, profile_dict, read_profile, write_profile
from doubleweave.schedule.choice import Choice

FULL = Profile(
    name="all of it",
    kind="measured",
    devices={
        "npu": Device(160.0, 50.0, 59.0, {"int8": 34000.0}, 0.3, 1),
        "cpu": Device(5.0, 5.0, 40.0, {"float32": 50.0}),
    },
    segments={
        "attention": {
            1: Measured((1, 8), (0, 64), ((1.5, 2.5), (3.0, 9.0)), (0.1, 0.2), (0.0, 0.3), (1.0, 0.9))
        }
    },
    hand_over_us={("npu", "cpu"): 1.5, ("cpu", "npu"): 2.5, ("cpu", "cpu"): 0.5},
    contention={2: {("npu", "cpu"): 0.1}, 4: {("cpu", "cpu"): 0.25, ("cpu", "npu"): 0.0}},
    same_worker_us=0.75,
    sources=("one", "another"),
    machine="a machine, 2 cores",
    program="0123456789ab",
    threads=2,
    decisions=(Decision(64, Choice("wavefront", ("any", "any"), 1, 8, 4, 2), 0.125),),
)
LEAST = {"name": "x", "kind": "estimate"}
DEVICE = {"launch_us": 1, "hand_over_us": 0, "bandwidth_gb_s": 10, "peak_gops": {"int8": 5}}
DECISION = {
    "tokens": 8,
    "schedule": "sequential",
    "workers": ["any"],
    "threads": 1,
    "chunk": 8,
    "in_flight": 1,
    "abreast": 1,
    "makespan_s": 0.1,
}
TABLE = {"rows": [1, 8], "cached": [0], "us": [[1.0], [2.0]]}


def test_everything_reads_back(tmp_path):
    write_profile(FULL, tmp_path / "p.toml")
    assert read_profile(tmp_path / "p.toml") == FULL
    assert parse_profile(profile_dict(FULL), "here") == FULL
    assert [path.name for path in tmp_path.iterdir()] == ["p.toml"]


def test_the_least_there_can_be():
    assert parse_profile(LEAST, "here") == Profile("x", "estimate")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, "here: key 'name' is missing"),
        (
            {"speed": 1},
            "here: found key 'speed', expected one of contention, decision, device, hand_over_us, kind",
        ),
        ({"same_worker_us": -1}, "here, same_worker_us: found -1, expected a number, 0 or more"),
        ({"threads": "two"}, "here, threads: found 'two', expected a whole number, 0 to 1024"),
        ({"device": 3}, "here, device: found 3, expected a table"),
        ({"device": {"npu": 3}}, "here, device npu: found 3, expected a table"),
        (
            {"device": {"npu": {**DEVICE, "ghz": 3}}},
            "device npu: found key 'ghz', expected one of bandwidth_gb_s",
        ),
        ({"device": {"npu": {"launch_us": 1}}}, "here, device npu: key 'bandwidth_gb_s' is missing"),
        (
            {"device": {"npu": {**DEVICE, "peak_gops": {"int3": 5}}}},
            "expected numbers for some of int4, int8, float16",
        ),
        (
            {"device": {"npu": {**DEVICE, "peak_gops": {"int8": 0}}}},
            "peak_gops.int8: found 0, expected a number above",
        ),
        (
            {"device": {"npu": {**DEVICE, "bandwidth_gb_s": "fast"}}},
            "bandwidth_gb_s: found 'fast', expected a number",
        ),
        (
            {"device": {"npu": {**DEVICE, "workers": 1.5}}},
            "workers: found 1.5, expected a whole number, 1 to 1024",
        ),
        ({"device": {"npu": {**DEVICE, "workers": 0}}}, "workers: found 0, expected a number above 0"),
        ({"hand_over_us": {"npu": 5}}, "here, hand_over_us.npu: found 5, expected a table"),
        ({"hand_over_us": {"npu": {"cpu": "slow"}}}, "hand_over_us.npu.cpu: found 'slow', expected a number"),
        (
            {"contention": {"npu": {"cpu": 1}}},
            "here, contention: found table 'npu', expected workers_1, workers_2",
        ),
        ({"contention": {"workers_2": {"npu": {"cpu": True}}}}, "npu.cpu: found True, expected a number"),
        (
            {"segment": {"a": {"two": TABLE}}},
            "here, segment a: found table 'two', expected threads_1, threads_2",
        ),
        ({"segment": {"a": {"threads_1": {"rows": [1], "us": [[1]]}}}}, "key 'cached' is missing"),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "rows": [8, 1]}}}},
            r"found \[8.0, 1.0\], expected numbers that",
        ),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "rows": []}}}},
            r"found \[\], expected numbers that rise from 1",
        ),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "us": [[1]]}}}},
            "us: expected 2 lists of numbers, one for each",
        ),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "us": [[1], [1, 2]]}}}},
            "us: found 2 numbers, expected 1",
        ),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "us": [[1], ["x"]]}}}},
            "us: found 'x', expected a number",
        ),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "spread": [0.1]}}}},
            "spread: found 1 numbers, expected 2",
        ),
        (
            {"segment": {"a": {"threads_1": {**TABLE, "rows": 3}}}},
            "rows: found 3, expected a list of numbers",
        ),
        ({"decision": [{"tokens": 3}]}, "here, decision: key 'abreast' is missing"),
        ({"decision": 3}, "here, decision: found 3, expected a list"),
        (
            {"decision": [{**DECISION, "tokens": "many"}]},
            "tokens: found 'many', expected a whole number, 1 to 16777216",
        ),
        (
            {"decision": [{**DECISION, "chunk": 2**31}]},
            "chunk: found 2147483648, expected a whole number, 1 to 65536",
        ),
        (
            {"decision": [{**DECISION, "schedule": "auto"}]},
            "schedule: found 'auto', expected one of sequential",
        ),
        ({"decision": [{**DECISION, "workers": "any"}]}, "workers: found 'any', expected a list of devices"),
        ({"decision": [{**DECISION, "makespan_s": None}]}, "makespan_s: found None, expected a number"),
        ({"sources": "here"}, "here, sources: found 'here', expected a list"),
        ({"machine": "two\nlines"}, r"here, machine: found 'two\\nlines', expected a text of one line"),
        ({"device": {"a\nb": DEVICE}}, r"here: found name 'a\\nb', expected printable letters"),
        (
            {"hand_over_us": {"npu": {"cpu": 1e10}}},
            "found 10000000000.0, expected a number, 0 or more, 1000000000",
        ),
        (
            {"contention": {"workers_2": {"a": {"b": 200}}}},
            "found 200, expected a number, 0 or more, 100 at most",
        ),
        (
            {"contention": {"workers_99999999999": {}}},
            "found table 'workers_99999999999', expected workers_1",
        ),
        (
            {"machine": "x" * 10**6, "name": list(range(10**6))},
            r"name: found \[0, 1, .{0,120}…, expected a text",
        ),
    ],
)
def test_what_is_wrong_is_named(change, message):
    data = {key: value for key, value in {**LEAST, **change}.items() if value is not None}
    with pytest.raises(InputError, match=message) as refused:
        parse_profile(data, "here")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as a profile"),
        (b"\xff\xfe", "cannot be read as a profile"),
        (b"name = ", "is no TOML"),
        (b"[[decision]]\ntokens = 3", "key 'kind' is missing"),
    ],
)
def test_files_that_are_no_profile(tmp_path, content, message):
    path = tmp_path / "p.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_profile(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    import tomli_w

    path = tmp_path / "p.toml"
    write_profile(FULL, path)

    def fail(_: object) -> str:
        raise RuntimeError("full disk")

    monkeypatch.setattr(tomli_w, "dumps", fail)
    with pytest.raises(RuntimeError):
        write_profile(Profile("other", "estimate"), path)
    assert read_profile(path) == FULL
    assert [file.name for file in tmp_path.iterdir()] == ["p.toml"]
