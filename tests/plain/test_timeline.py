"""Timelines as text, and their sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubleweave.tables import format_table
from doubleweave.timeline.timeline import Event, Timeline

MS = 1_000_000


def pipeline() -> Timeline:
    """Two workers, two chunks, one behind the other."""
    return Timeline(
        (
            Event("block_0", "block_0", "cpu", 0, 0, 0, 4 * MS),
            Event("attention_0", "attention", "cpu", 0, 0, 4 * MS, 5 * MS),
            Event("block_0", "block_0", "cpu", 1, 1, 4 * MS, 8 * MS),
            Event("block_1", "block_1", "cpu", 0, 0, 5 * MS, 9 * MS),
            Event("attention_0", "attention", "cpu", 1, 1, 8 * MS, 10 * MS),
            Event("block_1", "block_1", "cpu", 1, 1, 10 * MS, 14 * MS),
        ),
        num_workers=2,
    )


def test_gantt(golden):
    golden("gantt.txt", pipeline().gantt(56))


def test_table(golden):
    golden("timeline_table.txt", pipeline().table())


def test_sums():
    timeline = pipeline()
    assert timeline.makespan_s == pytest.approx(0.014)
    assert [timeline.busy_s(worker) for worker in range(2)] == pytest.approx([0.009, 0.010])


@st.composite
def timelines(draw) -> Timeline:
    num_workers = draw(st.integers(1, 3))
    events = []
    for worker in range(num_workers):
        now = 0
        for _ in range(draw(st.integers(0, 6))):
            now += draw(st.integers(0, 1000))
            end = now + draw(st.integers(1, 1000))
            segment = draw(st.sampled_from(["attention", "block_3", "lm_head"]))
            events.append(Event(segment, segment, "cpu", draw(st.integers(0, 40)), worker, now, end))
            now = end
    return Timeline(tuple(sorted(events, key=lambda event: event.start_ns)), num_workers)


@given(timelines(), st.integers(10, 80))
def test_gantt_has_a_row_of_the_width_for_each_worker(timeline, width):
    lines = timeline.gantt(width).splitlines()
    if not timeline.events:
        assert lines == ["(nothing ran)"]
        return
    rows = lines[:-2]  # the axis and the legend follow
    assert [len(row) for row in rows] == [len("worker 0 |") + width + 1] * timeline.num_workers
    for worker, row in enumerate(rows):
        shown = set(row.partition("|")[2].strip("|")) - {"."}
        marks = {
            "abcdefghijklmnopqrstuvwxyz"[e.chunk % 26] if e.segment == "attention" else str(e.chunk % 10)
            for e in timeline.events
            if e.worker == worker
        }
        assert shown <= marks


@given(timelines())
def test_busy_time_fits_in_the_makespan(timeline):
    for worker in range(timeline.num_workers):
        assert 0 <= timeline.busy_s(worker) <= timeline.makespan_s + 1e-12


@given(st.lists(st.lists(st.text("abc1", max_size=5), min_size=3, max_size=3), min_size=1, max_size=5))
def test_table_columns_line_up(rows):
    lines = format_table(rows).split("\n")
    assert len(lines) == len(rows)
    assert len({len(line) for line in lines}) == 1
