"""The machines that come with the package: every figure has its source, and estimates agree with what was published."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import toys
from doubleweave import _scheduling
from doubleweave.errors import InputError
from doubleweave.ir.split import FixedSizes, Segment
from doubleweave.predict.find_profile import GENERIC, shipped, shipped_names
from doubleweave.predict.profile import Profile
from doubleweave.predict.profile_file import parse_profile, profile_dict
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.task_graph import TaskGraph, build

MACHINES = [name for name in shipped_names() if name != GENERIC]
WEIGHTS = ("int4", "int8", "float16", "float32")
LLAMA_8B_BLOCKS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # weights
# Sources begin with the figures that they are of: "npu.workers = 1, npu.launch_us = 2 (assumed): why".
STATEMENT = re.compile(r"((?:[\w.]+ = [\d.]+(?:, )?)+) \((?:published|derived|assumed)\): (.+)")


def figures(tables: dict[str, Any]) -> dict[str, float]:
    """Every number in tables of tables, by its path."""
    found = {}
    for key, value in tables.items():
        below = figures(value) if isinstance(value, dict) else {"": value}
        found |= {f"{key}.{path}".rstrip("."): number for path, number in below.items()}
    return found


def stated(profile: Profile) -> list[tuple[str, float]]:
    """The figures that sources are given for."""
    matches = [match for source in profile.sources if (match := STATEMENT.fullmatch(source))]
    pairs = [pair.split(" = ") for match in matches for pair in match[1].split(", ")]
    return [(key, float(value)) for key, value in pairs]


def toy_graph() -> TaskGraph:
    shape = FixedSizes((1, 4, 8))
    return build(toys.split(2, shape, static_device="npu"), cut(30, shape), "last")


def block(num_weights: int, weights: str) -> Segment:
    """A segment for the NPU with that many weights in that format."""
    size = {"int4": 0.5, "int8": 1.0}[weights]
    found = toys.split(1, FixedSizes((1024,)), static_device="npu").segment("block_0")
    return replace(found, weight_bytes=int(num_weights * size))


def time_us(name: str, num_weights: int, rows: int, weights: str) -> float:
    profile = replace(shipped(name), weights=weights)
    times = _scheduling.SegmentTimes([], profile.estimate(block(num_weights, weights)).native())
    return float(_scheduling.time_us(times, np.array([float(rows)]), np.zeros(1), 1)[0])


def test_these_machines_are_shipped():
    assert set(MACHINES) >= {
        *("sm8550", "sm8650", "sm8750", "sm8850", "x1e80100"),
        *("intel-core-ultra-7-155h", "intel-core-ultra-7-258v"),
    }
    with pytest.raises(InputError, match="sm8650"):
        shipped("sm9999")


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_profile_is_an_estimate_of_an_npu_and_a_cpu(name):
    profile = shipped(name)
    assert profile.kind == "estimate"
    assert profile.name
    assert profile.sources
    assert set(profile.devices) == {"npu", "cpu"}
    assert name == GENERIC or profile.devices["npu"].workers == 1
    assert all(0 < device.efficiency <= 1 for device in profile.devices.values())
    assert parse_profile(profile_dict(profile), name) == profile


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_has_a_source_and_every_source_its_figure(name):
    profile = shipped(name)
    devices = {key: device.to_dict() for key, device in profile.devices.items()}
    rest = {
        key: table
        for key, table in profile_dict(profile).items()
        if key in ("contention", "hand_over_us", "same_worker_us")
    }
    sources = stated(profile)
    assert dict(sources) == figures(devices | rest)
    assert len(dict(sources)) == len(sources)


@pytest.mark.parametrize("name", MACHINES)
def test_peaks_are_given_for_int8_and_do_not_rise_with_the_size_of_a_number(name):
    for device in shipped(name).devices.values():
        peaks = [device.peak_gops[kind] for kind in WEIGHTS if kind in device.peak_gops]
        assert "int8" in device.peak_gops
        assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize("weights", WEIGHTS)
def test_costs_are_finite_and_above_zero(name, weights):
    graph = toy_graph()
    profile = replace(shipped(name), weights=weights)
    costs = toys.costs(profile, graph, threads=2, workers=2, cached=100)
    assert len(costs.duration_ns) == len(graph)
    assert costs.same_worker_ns > 0
    assert all(0 < ns < 10**9 for ns in costs.duration_ns)  # a toy's task takes less than a second
    assert set(costs.hand_over_ns) == {(a, b) for a in ("cpu", "npu") for b in ("cpu", "npu")}
    assert all(ns > 0 for ns in costs.hand_over_ns.values())
    assert all(0 <= share < 1 for share in costs.contention.values())


@pytest.mark.parametrize(
    "machines",
    [
        ["sm8550", "sm8650", "sm8750", "sm8850"],
        ["intel-core-ultra-7-155h", "intel-core-ultra-7-258v"],
    ],
)
def test_a_later_generation_is_not_slower(machines):
    for older, newer in pairwise(machines):
        a, b = shipped(older).devices["npu"], shipped(newer).devices["npu"]
        assert a.peak_gops["int8"] < b.peak_gops["int8"]
        assert a.bandwidth_gb_s <= b.bandwidth_gb_s
        for rows in (1, 128, 1024):
            assert time_us(newer, 10**8, rows, "int8") <= time_us(older, 10**8, rows, "int8")


@pytest.mark.parametrize(
    ("name", "rows", "published_s"),
    [
        ("sm8550", 1024, 1.807),
        ("sm8650", 1024, 1.3165),
        ("x1e80100", 1024, 1.668),
        ("x1e80100", 128, 0.2077),
        ("sm8750", 128, 0.1545),
        ("sm8850", 128, 0.1100),
    ],
)
def test_estimate_of_a_prefill_is_the_published_time(name, rows, published_s):
    """Llama 3 8B with 4-bit weights on the NPU, from Qualcomm's AI Hub."""
    assert time_us(name, LLAMA_8B_BLOCKS, rows, "int4") / 1e6 == pytest.approx(published_s, rel=0.03)
