"""Plans: the fastest is chosen, the simplest of equals, what limits it is said, and devices are not overbooked."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

import toys
from doubleweave.cli.show_plan import chunks_text, plan_dict, plan_text
from doubleweave.errors import InputError
from doubleweave.ir.split import FixedSizes, Split, rows
from doubleweave.predict.estimate import Device
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.planner import (
    choice_of,
    decisions,
    forecast,
    hidden_share,
    merged,
    plan,
    simulate,
)
from doubleweave.predict.profile import Decision, Measured, Profile
from doubleweave.schedule.choice import Choice, Wish
from doubleweave.schedule.schedule import Schedule


def profile(block_us=100.0, attention_us=50.0, speed_up=1.5, **changes) -> Profile:
    """Times a row, for one thread; four threads are `speed_up` times as fast."""

    def table(us: float) -> dict[int, Measured]:
        return {
            threads: Measured((0, 100), (0,), ((0.0,), (100 * us / (speed_up if threads == 4 else 1.0),)))
            for threads in (1, 4)
        }

    names = [segment.name for segment in toys.split(4, rows(1, 32)).segments]
    segments = {name: table(attention_us if name == "attention" else block_us) for name in names}
    return replace(Profile("p", "measured", segments=segments), **changes)


SPLIT = toys.split(4, rows(1, 32))


def planner(costs: Profile | None = None, split: Split = SPLIT) -> RunPlanner:
    return RunPlanner(split, costs or profile(), 4096)


def test_the_fastest_is_chosen_and_the_table_is_in_order():
    found = plan(planner(), 256, 4)
    times = [item.makespan_s for item in found.candidates]
    assert times == sorted(times)
    assert found.chosen.makespan_s <= times[0] * 1.01
    assert len(found.chosen.workers) == 4  # four workers beat four threads that are 1.5 times as fast
    for item in found.candidates:
        run = simulate(planner(), choice_of(item), 256)
        assert item.makespan_s == run.end_ns.max() / 1e9
        assert item.lower_bound_s <= item.makespan_s


def test_of_equals_the_simplest_is_chosen():
    found = plan(planner(profile(speed_up=4.0)), 8, 4)
    assert (found.chosen.schedule, found.chosen.threads) == ("sequential", 4)


def test_contention_makes_one_worker_with_every_thread_the_best():
    crowded = profile(speed_up=3.0, contention={2: {("cpu", "cpu"): 1.0}})
    assert plan(planner(crowded), 256, 4).chosen.schedule == "sequential"


def test_bound_bottleneck_and_hidden_time():
    split = toys.split(4, rows(1, 32), static_device="npu")
    for block_us, attention_us, device in ((100.0, 1.0, "npu"), (1.0, 100.0, "cpu")):
        costs = profile(block_us, attention_us)
        run = simulate(planner(costs, split), Choice("out_of_order", ("npu", "cpu"), 1, 32, 8), 512)
        found = forecast(run)
        assert (found.bound, found.bottleneck) == (f"work of {device}", device)
        assert found.busy_s[0] + found.busy_s[1] == pytest.approx((run.end_ns - run.start_ns).sum() / 1e9)
        assert found.hidden > 0.5 if device == "npu" else found.hidden < 0.5


def test_hidden_share_by_hand():
    """The CPU runs from 0 to 10 and from 20 to 30, another worker from 5 to 25."""
    schedule = Schedule("given", ("cpu", "npu"), ((0, 1), (2,)))
    start, end = np.array([0, 20, 5]), np.array([10, 30, 25])
    assert hidden_share(schedule, np.array([True, True, False]), start, end) == pytest.approx(10 / 20)


def test_no_more_workers_than_a_device_can_run():
    split = toys.split(4, rows(1, 32), static_device="npu")
    one = {
        "npu": Device(1.0, 1.0, 10.0, {"int8": 10.0}, workers=1),
        "cpu": Device(1.0, 1.0, 10.0, {"float32": 1.0}, workers=3),
    }
    found = Profile("phone", "estimate", devices=one)
    tried = planner(found, split).candidates(256, 4)
    for choice in tried:
        assert sum(worker in ("npu", "any") for worker in choice.workers) <= 1
        assert sum(worker in ("cpu", "any") for worker in choice.workers) <= 3
    # The CPU's worker may use every core, whatever the NPU does.
    assert any(choice.workers == ("npu", "cpu") and choice.threads == 3 for choice in tried)
    with pytest.raises(
        InputError, match=r"found 2 that run tasks of device 'npu', expected at most 1 .* on phone"
    ):
        simulate(planner(found, split), Choice("wavefront", ("any", "any"), 1, 32, 4, 2), 256)


def test_candidates_differ_in_chunks_schedules_workers_and_threads():
    static = toys.split(4, FixedSizes((1, 8, 32)))
    for split, sizes in ((SPLIT, {32, 16}), (static, {32, 8, 1})):
        tried = planner(profile(), split).candidates(100, 4)
        assert {choice.chunk for choice in tried} == sizes
        assert {choice.schedule for choice in tried} == {
            "sequential",
            "lockstep",
            "pipelined",
            "out_of_order",
            "wavefront",
        }
        assert {len(choice.workers) for choice in tried} == {1, 2, 4}
        assert {choice.threads for choice in tried if choice.schedule == "sequential"} == {1, 4}
        assert len(tried) == len(set(tried))
    assert {choice.schedule for choice in planner().candidates(1, 4)} == {"sequential"}
    assert {choice.threads for choice in planner().candidates(300, 1)} == {1}


def test_no_tokens_are_refused():
    with pytest.raises(InputError, match="prompt-len: found 0, expected at least 1"):
        plan(planner(), 0, 4)


def test_decisions_cover_every_length():
    found = decisions(planner(), 4, 200)
    assert [d.tokens for d in found] == sorted({d.tokens for d in found})
    assert found[-1].tokens == 200
    chosen = replace(profile(), threads=4, decisions=found)
    for tokens in (1, 8, 64, 200):
        best = plan(planner(), tokens, 4).chosen.makespan_s
        run = simulate(planner(), planner(chosen).choose(Wish(threads=4), tokens), tokens)
        assert run.end_ns.max() / 1e9 <= best * 1.011


def test_neighbours_that_run_alike_are_one_decision():
    one, other = Choice("sequential", ("any",), 4, 32, 1), Choice("pipelined", ("cpu",) * 4, 1, 32, 8)
    found = [Decision(n, choice, n / 10) for n, choice in ((1, one), (2, one), (4, other), (8, one))]
    assert merged(found) == (found[1], found[2], found[3])


def test_texts():
    found = plan(planner(), 256, 4)
    text = plan_text(found, limit=3)
    lines = text.splitlines()
    assert lines[0].startswith(f"256 tokens: {found.chosen.schedule} on any") or "cpu" in lines[0]
    assert "times as fast as the fastest sequential run; limited by its" in lines[0]
    assert sum(line.startswith("* ") for line in lines) == 1
    assert lines[-1] == f"  … and {len(found.candidates) - 3} slower ones"
    data = plan_dict(found)
    assert data["prompt_tokens"] == 256
    assert data["candidates"][0] == asdict(found.candidates[0])
    assert {"schedule", "chunks", "makespan_s", "lower_bound_s", "overlap_efficiency", "busy_s"} <= set(data)


def test_chunks_as_text():
    assert chunks_text([(0, 8, 8), (8, 8, 8), (16, 3, 8)]) == "2x8 1x3@8"
