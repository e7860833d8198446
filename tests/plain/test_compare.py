"""Two timelines task by task."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from doubleweave.errors import InputError
from doubleweave.timeline.compare import compare, comparison_text
from doubleweave.timeline.timeline import Event, Timeline

MS = 1_000_000


def timeline(*events: tuple[str, int, int, float, float], title: str = "") -> Timeline:
    """(call, chunk, worker, start ms, end ms); a call's segment has its name."""
    made = (
        Event(call, call, "cpu", chunk, worker, round(start * MS), round(end * MS))
        for call, chunk, worker, start, end in events
    )
    return Timeline(tuple(sorted(made, key=lambda event: event.start_ns)), 2, title=title)


A = timeline(("block_0", 0, 0, 0, 4), ("attention", 0, 1, 4, 5), ("block_1", 0, 0, 5, 9), title="predicted")
B = timeline(("block_0", 0, 0, 0, 5), ("attention", 0, 1, 5, 8), ("block_1", 0, 0, 8, 13), title="measured")


def test_times_by_kind_and_by_task():
    found = compare(A, B)
    assert (found.a, found.b, found.a_makespan_ms, found.b_makespan_ms) == (
        "predicted",
        "measured",
        9.0,
        13.0,
    )
    assert {kind.kind: (kind.tasks, kind.a_ms, kind.b_ms) for kind in found.kinds} == {
        "block_*": (2, 8.0, 10.0),
        "attention": (1, 1.0, 3.0),
    }
    assert [pair.task for pair in found.tasks] == ["attention/0", "block_0/0", "block_1/0"]
    assert (found.tasks[0].a_ms, found.tasks[0].b_ms) == (1.0, 3.0)
    assert (found.tasks[0].a_start_ms, found.tasks[0].b_start_ms) == (4.0, 5.0)
    assert (found.a_busy_ms, found.b_busy_ms) == ((8.0, 1.0), (10.0, 3.0))
    assert (found.moved, found.reordered, found.only_a, found.only_b) == (0, 0, (), ())


def test_a_timeline_is_like_itself():
    found = compare(A, A)
    assert all(pair.a_ms == pair.b_ms for pair in found.tasks)
    assert (found.moved, found.reordered) == (0, 0)


def test_moved_and_reordered_tasks_are_counted():
    other = timeline(("block_0", 0, 1, 0, 4), ("attention", 0, 1, 4, 5), ("block_1", 0, 0, 5, 9))
    found = compare(A, other)
    # block_0 moved; attention and block_1 stand behind other tasks than before.
    assert (found.moved, found.reordered) == (1, 2)


def test_tasks_of_one_alone_are_listed():
    more = replace(A, events=(*A.events, Event("lm_head", "lm_head", "cpu", 0, 0, 9 * MS, 10 * MS)))
    assert compare(A, more).only_b == ("lm_head/0",)
    assert compare(more, A).only_a == ("lm_head/0",)
    assert "1 task in B alone: lm_head/0" in comparison_text(compare(A, more))


def test_nothing_in_common_is_refused():
    with pytest.raises(
        InputError, match="no task in common; expected traces of the same program and prompt length"
    ):
        compare(A, timeline(("glue", 0, 0, 0, 1)))


def test_text_and_data():
    text = comparison_text(compare(A, B), limit=1)
    assert "A: predicted, 9.00 ms" in text
    assert "B: measured, 13.00 ms (1.444 of A)" in text
    assert "attention/0" in text
    assert "block_0/0" not in text
    assert "3 tasks in both; 0 on another worker, 0 behind another task" in text
    data = asdict(compare(A, B))
    assert data["tasks"][0]["task"] == "attention/0"
    assert data["kinds"][0]["kind"] == "block_*"
