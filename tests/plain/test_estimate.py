"""Times from published figures, against the roofline worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import toys
from doubleweave import _scheduling
from doubleweave.errors import InputError
from doubleweave.ir.split import Port, Traffic, rows
from doubleweave.predict.estimate import Device, estimate, weight_format
from doubleweave.predict.profile_file import parse_device

# 1,000 operations and 1,000 bytes a microsecond of one worker; half of it reached in products.
DEVICE = Device(10.0, 5.0, 1.0, {"int8": 1.0, "float32": 1.0}, 0.5)
SPLIT = toys.split(1, rows(1, 64))


def estimate_us(device, segment, weights, rows_, cached, threads):
    """Microseconds of one call for `rows_` rows, where the cache holds `cached` with them."""
    times = _scheduling.SegmentTimes([], estimate(device, segment, weights).native())
    return _scheduling.time_us(times, rows_, cached - rows_, threads)


def us(
    name: str, device: Device = DEVICE, *, rows_=8.0, cached=8.0, weights="int8", threads=1, on="cpu"
) -> float:
    segment = replace(SPLIT.segment(name), device=on)
    found = estimate_us(device, segment, weights, np.array([rows_]), np.array([cached]), threads)
    return float(found[0])


def test_a_block_is_bound_by_its_operations():
    # 2 operations x 8 rows x 4,096 weights (a byte each) at 500 a microsecond.
    assert us("block_1") == pytest.approx(10 + 2 * 8 * 4096 / 500)


def test_a_block_of_one_row_is_bound_by_its_bytes():
    # Weights, two inputs and one output of 8 floats.
    fast = replace(DEVICE, peak_gops={"int8": 1e9})
    assert us("block_1", fast, rows_=1.0) == pytest.approx(10 + (4096 + 3 * 8 * 4) / 1000)


@pytest.mark.parametrize(
    ("weights", "parameters"), [("int4", 8192), ("int8", 4096), ("float16", 2048), ("float32", 1024)]
)
def test_operations_follow_the_format_of_the_weights(weights, parameters):
    every = replace(DEVICE, peak_gops=dict.fromkeys(("int4", "int8", "float16", "float32"), 1.0))
    assert us("block_1", every, weights=weights, rows_=64.0) == pytest.approx(10 + 2 * 64 * parameters / 500)


def test_a_format_without_a_peak_takes_the_lowest_one():
    device = replace(DEVICE, peak_gops={"int8": 4.0, "float16": 2.0})
    assert us("block_1", device, weights="float32", rows_=64.0) == pytest.approx(10 + 2 * 64 * 1024 / 1000)


def test_attention_is_causal():
    """A chunk of 8 rows behind 8 others: keys before it for all rows, half of its own."""
    # 4 operations a query row, key and column: 8 columns, 8 rows, 16 - 4 keys.
    assert us("attention", cached=16.0) == pytest.approx(10 + 4 * 8 * 8 * 12 / 500)


def test_a_table_costs_its_rows_alone():
    # 8 ids of 8 bytes in, 8 rows of 8 floats out; not the table's 512 bytes.
    segment = replace(SPLIT.segment("embed_tokens"), num_delegated=0, device="cpu")
    found = estimate_us(DEVICE, segment, "int8", np.array([8.0]), np.array([8.0]), 1)
    assert found[0] == pytest.approx(10 + (8 * 8 + 8 * 8 * 4) / 1000)


def test_a_table_whose_rows_are_scaled_by_a_delegate_costs_its_rows_alone():
    segment = replace(SPLIT.segment("embed_tokens"), num_delegated=1, device="cpu")
    segment = replace(segment, table_bytes=segment.weight_bytes)
    found = estimate_us(DEVICE, segment, "int8", np.array([8.0]), np.array([8.0]), 1)
    assert found[0] == pytest.approx(10 + (8 * 8 + 8 * 8 * 4) / 1000)


def test_threads_share_the_work_of_a_cpu_as_far_as_it_has_cores():
    work = 2 * 8 * 4096 / 500
    assert us("block_1", threads=4) == pytest.approx(10 + work / 4)
    assert us("block_1", replace(DEVICE, workers=2), threads=4) == pytest.approx(10 + work / 2)
    assert us("block_1", threads=4, on="npu") == pytest.approx(10 + work)


def test_a_compilers_count_of_bytes_comes_before_ours():
    fast = replace(DEVICE, peak_gops={"int8": 1e9})
    segment = replace(SPLIT.segment("block_1"), traffic=(Traffic(8, 9000, 1000, 500, 500),))
    found = estimate_us(fast, segment, "int8", np.array([8.0, 1.0]), np.array([8.0, 8.0]), 1)
    # 10,000 bytes for 8 rows; for one row, of which the compiler said nothing, weights, inputs and output.
    assert found == pytest.approx([10 + 10000 / 1000, 10 + (4096 + 3 * 8 * 4) / 1000])


def test_counted_weights_come_before_bytes():
    segment = replace(SPLIT.segment("block_1"), linear_weights=1000)
    found = estimate_us(DEVICE, segment, "int8", np.array([64.0]), np.array([64.0]), 1)
    assert found[0] == pytest.approx(10 + 2 * 64 * 1000 / 500)


def test_a_row_reads_the_experts_that_it_chose():
    segment = replace(
        SPLIT.segment("block_1"), linear_weights=1, expert_weights=2000, chosen_weights=500, weight_bytes=4096
    )
    fast = replace(DEVICE, peak_gops={"int8": 1e9})
    found = estimate_us(fast, segment, "int8", np.array([1.0, 2.0]), np.array([8.0, 8.0]), 1)
    # All but the experts' 2,000 bytes in every call; a quarter of those for a row, and of the rest for the next.
    expected = [4096 - 2000 + 500 + 96, 4096 - 2000 + 500 + 375 + 192]
    assert found == pytest.approx([10 + size / 1000 for size in expected])


def test_inlined_attention_goes_over_the_whole_cache():
    block = SPLIT.segment("block_1")
    past = Port("past", "float32", (1, 32, 8))
    segment = replace(block, inputs=(*block.inputs, past), attended_width=100, linear_weights=1, device="npu")
    found = estimate_us(DEVICE, segment, "int8", np.array([8.0]), np.array([8.0]), 1)
    # In float16, for which the device has no peak: its lowest. 32 rows of the cache and 8 of the chunk.
    assert found[0] == pytest.approx(10 + 2 * 8 * 1 / 500 + 2 * 100 * 8 * (32 + 8) / 500)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("none", "float32"),
        ("8da8w", "int8"),
        ("8da4w", "int4"),
        ("16a4w", "int4"),
        ("16a4w_block", "int4"),
        ("8a8w", "int8"),
    ],
)
def test_the_format_of_a_recipes_weights(recipe, kind):
    assert weight_format(recipe) == kind


def test_devices_read_back():
    for device in (DEVICE, replace(DEVICE, workers=3)):
        assert parse_device(device.to_dict(), "here") == device


def test_a_device_needs_its_figures():
    with pytest.raises(InputError, match="here: key 'bandwidth_gb_s' is missing"):
        parse_device({"launch_us": 1, "hand_over_us": 1, "peak_gops": {"int8": 1}}, "here")
