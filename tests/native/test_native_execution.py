"""Replaying schedules natively, on small real methods. Knows nothing of how schedules are made."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch

from doubleweave import _native
from native_toys import HEAD_DIM, HEADS, KV_HEADS, H, expected, rows_of, run, toy_modules

B, T = _native.Binding, _native.Task


def chain(program, num_tasks: int, num_rows: int = 16):
    """Buffers and a chain of "mlp" and "mlp_b" in turn: buffer i -> buffer i + 1."""
    buffers = _native.Buffers([num_rows * H * 4] * (num_tasks + 1))
    buffers.view(0, [1, num_rows, H])[:] = rows_of(num_rows)
    sizes = [1, num_rows, H]
    tasks = [
        T(i % 2, [B(i, sizes)], [B(i + 1, sizes)], [i - 1] if i else [], label=100 + i)
        for i in range(num_tasks)
    ]
    return buffers, [program.load("mlp"), program.load("mlp_b")], tasks


def regions(buffers) -> list:
    return [buffers.region(i) for i in range(len(buffers))]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_workers_share_a_chain(program, num_workers):
    buffers, instances, tasks = chain(program, 12)
    workers = [list(range(w, 12, num_workers)) for w in range(num_workers)]
    execution = _native.Execution(instances, regions(buffers), tasks, workers)
    assert (execution.num_tasks, execution.num_workers) == (12, num_workers)
    want = rows_of(16)
    for i in range(12):
        want = expected(toy_modules()[("mlp", "mlp_b")[i % 2]], want)
    for _ in range(50):
        buffers.view(12, [1, 16, H])[:] = 0
        assert execution.run() is None
        np.testing.assert_allclose(buffers.view(12, [1, 16, H]), want, rtol=1e-3, atol=1e-4)


def test_timeline(program):
    buffers, instances, tasks = chain(program, 6)
    execution = _native.Execution(instances, regions(buffers), tasks, [[0, 2, 4], [1, 3, 5]])
    events = execution.run(0, record=True)
    assert events.shape == (6, 4)
    assert events.dtype == np.int64
    assert events[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert events[:, 1].tolist() == [0, 0, 0, 1, 1, 1]
    by_task = events[np.argsort(events[:, 0])]
    assert (by_task[:, 3] > by_task[:, 2]).all()
    assert (by_task[1:, 2] >= by_task[:-1, 3]).all()


def test_more_threads_per_worker(program):
    buffers, instances, tasks = chain(program, 4)
    most = _native.max_threads()
    execution = _native.Execution(instances, regions(buffers), tasks, [[0, 2], [1, 3]], most)
    one = _native.Execution(instances, regions(buffers), tasks, [[0, 1, 2, 3]])
    one.run()
    want = buffers.view(4, [1, 16, H]).copy()
    execution.run()
    np.testing.assert_array_equal(buffers.view(4, [1, 16, H]), want)
    assert _native.intra_op_threads() == most


def test_base_moves_addresses_and_sizes(program):
    """One decode step of attention over a cache, prepared once: the projections append at row `base`."""
    from doubleweave.compiler.graph.ops import attention_reference

    row = KV_HEADS * HEAD_DIM
    cache = _native.KvCache([row * 4] * 2, max_tokens=40)
    k, v = (rows_of(40, row, seed) for seed in (1, 2))
    q = np.empty((1, 1, HEADS * HEAD_DIM), np.float32)
    out = np.empty_like(q)
    areas = [_native.Region.of(q), cache.region(0), cache.region(1), _native.Region.of(out)]
    task = T(
        0,
        [B(0, [1, 1, HEADS * HEAD_DIM]), *(B(e, [1, 1, row], grow_dim=1) for e in (1, 2))],
        [B(3, [1, 1, HEADS * HEAD_DIM])],
    )
    step = _native.Execution([program.load("attention")], areas, [task], [[0]])
    assert step.max_base == 39
    for base in range(40):
        for entry, data in enumerate((k, v)):
            cache.view(entry, base + 1)[base] = data[0, base]
        q[:] = rows_of(1, HEADS * HEAD_DIM, seed=base)
        step.run(base)
        tensors = map(torch.from_numpy, (q, k[:, : base + 1].copy(), v[:, : base + 1].copy()))
        want = attention_reference(*tensors, HEADS, KV_HEADS, HEAD_DIM**-0.5, 0, 0.0)
        np.testing.assert_allclose(out, want.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        _native.Error, match=r"between 0 and 39, for task 0 .*input 1 to stay inside buffer 1"
    ):
        step.run(40)
    with pytest.raises(_native.Error, match="cannot start at -1"):
        step.run(-1)


def test_output_rows_move_with_base(program):
    x, cache = np.ascontiguousarray(rows_of(1)), _native.KvCache([H * 4], max_tokens=5)
    task = T(0, [B(0, [1, 1, H])], [B(1, [1, 1, H], offset=0, offset_per_token=H * 4)])
    append = _native.Execution([program.load("mlp")], [_native.Region.of(x), cache.region(0)], [task], [[0]])
    assert append.max_base == 4
    want = run(program.load("mlp"), x)[0, 0]
    for base in range(5):
        append.run(base)
        np.testing.assert_array_equal(cache.view(0, 5)[: base + 1], np.tile(want, (base + 1, 1)))
        assert not cache.view(0, 5)[base + 1 :].any()


def test_schedules_that_cannot_run_are_refused(program):
    buffers, instances, tasks = chain(program, 4)
    areas = regions(buffers)

    def build(workers, tasks=tasks, instances=instances, areas=areas, threads=1):
        return _native.Execution(instances, areas, tasks, workers, threads)

    sizes = [1, 16, H]
    free = [T(t.instance, t.inputs, t.outputs) for t in tasks]
    refused = [
        (
            lambda: build([[0, 1, 3, 2]]),
            r"wait for ever: worker 0 at task 3 \(label 103, method 'mlp_b'\) waits",
        ),
        (lambda: build([[1, 2], [3, 0]]), "wait for ever: worker 0 at task 1 .*worker 1 at task 3"),
        (lambda: build([[0, 1, 2]]), "task 3 .* is on no worker"),
        (lambda: build([[0, 1, 2, 3, 3]]), "task 3 .* is scheduled twice"),
        (lambda: build([[0, 1, 2, 3, 4]]), "worker 0 lists task 4, but there are 4"),
        (lambda: build([]), "at least one worker"),
        (lambda: build([[0, 1, 2, 3]], threads=99), "threads_per_worker must be 1 or"),
        (
            lambda: build([[0, 1], [2, 3]], free),
            "task 0 .*worker 0 and task 2 .*share an instance but nothing",
        ),
        (lambda: build([[0]], [T(2, [B(0, sizes)], [B(1, sizes)])]), "names instance 2 of 2"),
        (lambda: build([[0]], [T(0, [B(0, sizes)], [B(1, sizes)], [5])]), "waits for task 5"),
        (lambda: build([[0]], [T(0, [B(0, sizes)], [B(1, sizes)], [0])]), "wait for ever"),
        (lambda: build([[0]], [T(0, [], [B(1, sizes)])]), "binds 0 inputs and 1 outputs"),
        (lambda: build([[0]], [T(0, [B(9, sizes)], [B(1, sizes)])]), "names buffer 9 of 5"),
        (
            lambda: build([[0]], [T(0, [B(0, [1, 17, H])], [B(1, sizes)])]),
            "input 0 needs 4352 bytes at offset 0",
        ),
        (
            lambda: build([[0]], [T(0, [B(0, sizes, 4)], [B(1, sizes)])]),
            "at offset 4 of buffer 0, which has 4096",
        ),
        (lambda: build([[0]], [T(0, [B(0, sizes, -4)], [B(1, sizes)])]), "out of range"),
        (lambda: build([[0]], [T(0, [B(0, sizes)], [B(1)])]), "output 0 needs 32768 bytes"),
        (lambda: build([[0]], [T(0, [B(0, [1, 200, H])], [B(1, sizes)])]), "at most"),
    ]
    for make, message in refused:
        with pytest.raises(_native.Error, match=message):
            make()


def test_redundant_dependencies_order_an_instance(program):
    """Task 3 follows task 0 of the same instance only through tasks 1 and 2."""
    buffers, instances, _ = chain(program, 4)
    sizes = [1, 16, H]
    order = {0: [], 1: [0], 2: [1, 0], 3: [2, 0, 1]}
    tasks = [T(i % 2 if i < 3 else 0, [B(i, sizes)], [B(i + 1, sizes)], after) for i, after in order.items()]
    _native.Execution(instances, regions(buffers), tasks, [[0, 2], [1, 3]]).run()


@pytest.mark.parametrize("failing", [0, 3, 7])
def test_a_failing_task_stops_every_worker(program, failing):
    buffers, instances, tasks = chain(program, 8)
    x, y = np.ones((3, 4), np.float32), np.ones((6, 5), np.float32)
    areas = [
        *regions(buffers),
        _native.Region.of(x),
        _native.Region.of(y),
        _native.Region.of(np.empty(15, "f")),
    ]
    after = tasks[failing].after
    tasks[failing] = T(2, [B(9, [3, 4]), B(10, [6, 5])], [B(11, [3, 5])], after, label=100 + failing)
    execution = _native.Execution(
        [*instances, program.load("matmul")], areas, tasks, [[0, 2, 4, 6], [1, 3, 5, 7]]
    )
    for _ in range(20):
        message = rf"task {failing} \(label {100 + failing}, method 'matmul'\): method 'matmul' failed"
        with pytest.raises(_native.Error, match=message):
            execution.run(record=True)


@pytest.mark.alone
def test_ctrl_c_stops_a_run(program):
    num_tasks = 4000
    x = rows_of(128, 256)
    area = [_native.Region.of(x), _native.Region.of(np.empty_like(x))]
    bindings = [B(0, x.shape)], [B(1, x.shape)]
    tasks = [T(0, *bindings) for _ in range(num_tasks)]
    execution = _native.Execution([program.load("heavy")], area, tasks, [list(range(num_tasks))])
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    start = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        execution.run()
    assert time.monotonic() - start < 1.0
    timer.join()


def test_two_executions_with_other_thread_counts_take_turns(program):
    runs = []
    for threads in (1, _native.max_threads()):
        buffers, instances, tasks = chain(program, 6)
        runs.append(
            (_native.Execution(instances, regions(buffers), tasks, [[0, 2, 4], [1, 3, 5]], threads), buffers)
        )
    results = [[], []]

    def work(i: int) -> None:
        execution, buffers = runs[i]
        for _ in range(100):
            execution.run()
            results[i].append(buffers.view(6, [1, 16, H]).copy())

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results[0]) == len(results[1]) == 100
    for result in results[0] + results[1]:
        np.testing.assert_array_equal(result, results[0][0])


@pytest.mark.parametrize("seed", range(8))
def test_any_schedule_that_is_accepted_gives_the_same_numbers(program, seed):
    """A random graph: task i reads one of the last few buffers and writes buffer i + 1."""
    choose = random.Random(seed)
    num_tasks, num_workers, sizes = 40, choose.choice([2, 3, 4]), [1, 4, H]
    instances = [program.load(choose.choice(["mlp", "mlp_b"])) for _ in range(6)]
    buffers = _native.Buffers([4 * H * 4] * (num_tasks + 1))
    buffers.view(0, sizes)[:] = rows_of(4)
    last_use, tasks = {}, []
    for i in range(num_tasks):
        instance, source = choose.randrange(6), choose.randint(max(0, i - 4), i)
        after = {source - 1, last_use.get(instance, -1)} - {-1}
        last_use[instance] = i
        tasks.append(T(instance, [B(source, sizes)], [B(i + 1, sizes)], sorted(after)))
    workers = [[] for _ in range(num_workers)]
    for i in range(num_tasks):
        workers[choose.randrange(num_workers)].append(i)
    _native.Execution(instances, regions(buffers), tasks, [list(range(num_tasks))]).run()
    want = [buffers.view(i + 1, sizes).copy() for i in range(num_tasks)]
    execution = _native.Execution(instances, regions(buffers), tasks, workers)
    for _ in range(50):
        for i in range(num_tasks):
            buffers.view(i + 1, sizes)[:] = 0
        execution.run()
        for i in range(num_tasks):
            np.testing.assert_array_equal(buffers.view(i + 1, sizes), want[i])


# Rebound regions


def test_regions_lie_elsewhere_for_one_run(program):
    buffers, instances, tasks = chain(program, 2)
    execution = _native.Execution(instances, regions(buffers), tasks, [[0], [1]])
    execution.run()
    own = buffers.view(2, [1, 16, H]).copy()
    x = rows_of(16, seed=1)
    x.flags.writeable = False
    want = run(program.load("mlp_b"), run(program.load("mlp"), x))
    out = np.zeros((1, 20, H), np.float32)
    source, target = _native.Region.of(x, writable=False), _native.Region.of(out)
    assert (source.writable, target.writable) == (False, True)
    for rebound in ({0: source, 2: target}, [(2, target), (0, source)]):
        buffers.view(2, [1, 16, H])[:] = 0
        out[:] = 0
        assert execution.run(rebound=rebound) is None
        np.testing.assert_array_equal(out[:, :16], want)
        assert not out[:, 16:].any()
        assert not buffers.view(2, [1, 16, H]).any()
    execution.run()  # the regions of the execution count again
    np.testing.assert_array_equal(buffers.view(2, [1, 16, H]), own)
    np.testing.assert_array_equal(out[:, :16], want)


def test_base_moves_within_a_rebound_region(program):
    x, rows = rows_of(1), np.zeros((5, H), np.float32)
    cache = _native.KvCache([H * 4], max_tokens=5)
    task = T(0, [B(0, [1, 1, H])], [B(1, [1, 1, H], offset_per_token=H * 4)])
    append = _native.Execution([program.load("mlp")], [_native.Region.of(x), cache.region(0)], [task], [[0]])
    events = append.run(3, True, {1: _native.Region.of(rows)})
    assert events.shape == (1, 4)
    np.testing.assert_array_equal(rows[3], run(program.load("mlp"), x)[0, 0])
    assert not rows[[0, 1, 2, 4]].any()
    assert not cache.view(0, 5).any()


def test_rebound_regions_that_are_refused(program):
    buffers, instances, tasks = chain(program, 2)
    execution = _native.Execution(instances, regions(buffers), tasks, [[0, 1]])
    whole, frozen = rows_of(16), rows_of(16)
    frozen.flags.writeable = False
    region = _native.Region.of(whole)
    refused = [
        ({3: region}, "region 3 is rebound, but there are 3"),
        ({-1: region}, "region -1 is rebound, but there are 3"),
        ([(0, region), (0, region)], "region 0 is rebound twice"),
        ({0: _native.Region.of(rows_of(15))}, "region 0 is rebound to 3840 bytes, but needs .* 4096"),
        ({0: _native.Region.of(torch.empty(0))}, "region 0 is rebound to a null pointer"),
        (
            {2: _native.Region.of(frozen, writable=False)},
            "region 2 is read-only, but task 1 writes it; .*writable=True",
        ),
    ]
    for rebound, message in refused:
        with pytest.raises(_native.Error, match=message):
            execution.run(rebound=rebound)
    assert not buffers.view(1, [1, 16, H]).any()  # nothing ran
    with pytest.raises(TypeError):
        execution.run(rebound={0: whole})
    execution.run()
    assert buffers.view(2, [1, 16, H]).any()
    with pytest.raises(_native.Error, match="region 0 is read-only, but task 0 writes it"):
        _native.Execution(
            [instances[0]],
            [_native.Region.of(whole, False)],
            [T(0, [B(0, [1, 16, H])], [B(0, [1, 16, H])])],
            [[0]],
        )


# Copies


def test_copies_gather_and_scatter_rows(program):
    """Rows [:, 3:8] of [2, 12, H] go through "mlp" padded to 8 rows, and come back."""
    x, out = (
        torch.from_numpy(np.concatenate([rows_of(12, seed=s) for s in seeds])) for seeds in ((1, 2), (3, 4))
    )
    before = out.clone()
    row, rows, padded = H * 4, 5, 8
    staged = _native.Buffers([2 * padded * row] * 2)
    staged.view(0, [2, padded, H])[:] = 7
    areas = [_native.Region.of(x, writable=False), *regions(staged), _native.Region.of(out)]
    strides = {"num_blocks": 2, "block_bytes": rows * row}
    outer = {"offset": 3 * row, "stride": 12 * row}

    def copy(source: int, target: int, **more) -> object:
        inside = "target" if target == 1 else "source"
        outside = "source" if target == 1 else "target"
        more |= {f"{outside}_{key}": value for key, value in outer.items()}
        return _native.Copy(
            source=source, target=target, **{f"{inside}_stride": padded * row}, **strides, **more
        )

    gather = T.of_copy(copy(0, 1, pad_bytes=(padded - rows) * row), label=5)
    assert (gather.instance, gather.label, gather.inputs, gather.copy.pad_bytes) == (-1, 5, [], 3 * row)
    sizes = [1, padded, H]
    tasks = [
        gather,
        *(T(0, [B(1, sizes, b * padded * row)], [B(2, sizes, b * padded * row)], [0]) for b in (0, 1)),
        T.of_copy(copy(2, 3), [1, 2]),
    ]
    execution = _native.Execution([program.load("mlp")], areas, tasks, [[1, 2], [0, 3]])
    assert execution.max_base == 2**31 - 1
    events = execution.run(record=True)
    assert events[:, :2].tolist() == [[1, 0], [2, 0], [0, 1], [3, 1]]
    by_task = events[np.argsort(events[:, 0])]
    assert (by_task[[0, 2], 3] <= by_task[[1, 3], 2]).all()
    np.testing.assert_array_equal(staged.view(0, [2, padded, H])[:, :rows], x[:, 3:8])
    assert not staged.view(0, [2, padded, H])[:, rows:].any()
    want = expected(toy_modules()["mlp"], x[:, 3:8].numpy())
    np.testing.assert_allclose(out[:, 3:8], want, rtol=1e-4, atol=1e-5)
    for kept in (slice(0, 3), slice(8, 12)):
        assert torch.equal(out[:, kept], before[:, kept])
    other = torch.zeros_like(out)
    execution.run(1000, rebound={3: _native.Region.of(other)})  # no base moves a copy
    assert torch.equal(other[:, 3:8], out[:, 3:8])


def test_copies_of_any_shape():
    rng = np.random.default_rng(0)
    for _ in range(200):
        source = rng.integers(1, 256, 200, dtype=np.uint8)
        target = np.full(200, 255, np.uint8)
        blocks, block, pad, gap, skip = (int(n) for n in rng.integers(0, 7, 5))
        sizes = {
            "source_offset": int(rng.integers(0, 100)),
            "source_stride": skip,  # blocks read may overlap: a row for every batch
            "target_offset": int(rng.integers(0, 80)),
            "target_stride": block + pad + gap,
            "num_blocks": blocks,
            "block_bytes": block,
            "pad_bytes": pad,
        }
        want = target.copy()
        for i in range(blocks):
            start, end = (
                sizes[f"{side}_offset"] + i * sizes[f"{side}_stride"] for side in ("target", "source")
            )
            want[start : start + block] = source[end : end + block]
            want[start + block : start + block + pad] = 0
        areas = [_native.Region.of(source), _native.Region.of(target)]
        task = T.of_copy(_native.Copy(source=0, target=1, **sizes))
        _native.Execution([], areas, [task], [[0]]).run()
        np.testing.assert_array_equal(target, want)


def test_copies_that_are_refused(program):
    areas = [_native.Region.of(np.zeros(100, np.uint8)) for _ in range(2)]
    areas.append(_native.Region.of(np.zeros(100, np.uint8), writable=False))
    most = 2**63 - 1

    def build(**numbers: int) -> None:
        copy = _native.Copy(**({"source": 0, "target": 1, "block_bytes": 10} | numbers))
        _native.Execution([], areas, [T.of_copy(copy, label=7)], [[0]])

    name = r"task 0 \(label 7, copy\)"
    refused = [
        ({"source": 3}, f"{name} reads region 3 of 3"),
        ({"target": -1}, f"{name} writes region -1 of 3"),
        ({"block_bytes": 101}, r"reads 1 blocks of 101 \+ 0 bytes at offset 0, .* region 0 of 100 bytes"),
        ({"source_offset": 91}, "reads 1 blocks .* at offset 91"),
        ({"source_offset": most}, "reads 1 blocks"),
        ({"source_offset": 101, "num_blocks": 0}, "reads 0 blocks"),
        ({"source_stride": 46, "target_stride": 10, "num_blocks": 3}, "reads 3 blocks .* 46 apart"),
        ({"source_stride": most, "target_stride": 10, "num_blocks": 2}, "reads 2 blocks"),
        ({"source_stride": 2, "target_stride": 10, "num_blocks": most}, f"reads {most} blocks"),
        ({"target_offset": 86, "pad_bytes": 5}, r"writes 1 blocks of 10 \+ 5 bytes at offset 86"),
        ({"pad_bytes": most}, "writes 1 blocks"),
        ({"target_stride": 46, "num_blocks": 3}, "writes 3 blocks .* 46 apart"),
        ({"target_stride": 11, "pad_bytes": 2, "num_blocks": 2}, "overlap; set target_stride to at least 12"),
        ({"target": 0, "target_offset": 9}, "reads bytes 0 to 10 and writes bytes 9 to 19 of region 0"),
        ({"target": 0, "source_offset": 12, "pad_bytes": 3}, "reads bytes 12 to 22 and writes bytes 0 to 13"),
        ({"target": 2}, "region 2 is read-only, but task 0 writes it"),
    ]
    numbers = (
        "source_offset",
        "source_stride",
        "target_offset",
        "target_stride",
        "num_blocks",
        "block_bytes",
    )
    refused += [({key: -1}, f"{name} has a negative .*: -1") for key in (*numbers, "pad_bytes")]
    for wrong, message in refused:
        with pytest.raises(_native.Error, match=message):
            build(**wrong)
    build(source_offset=90, target_offset=90)
    build(source_offset=45, source_stride=15, num_blocks=4, target_stride=30)
    build(target=0, target_offset=10)
    build(source=2)


def test_copies_are_ordered_like_other_tasks(program):
    areas = [_native.Region.of(np.zeros(8, np.uint8)) for _ in range(3)]
    copies = [_native.Copy(source=i, target=i + 1, block_bytes=8) for i in (0, 1)]
    with pytest.raises(
        _native.Error,
        match=r"wait for ever: worker 0 at task 0 \(label 3, copy\) waits for task 1 \(label 0, copy\)",
    ):
        _native.Execution([], areas, [T.of_copy(copies[0], [1], 3), T.of_copy(copies[1])], [[0, 1]])
    # Two copies on two workers share no instance.
    _native.Execution([], areas, [T.of_copy(copy) for copy in copies], [[0], [1]]).run()


@pytest.mark.parametrize("base", [0, 1, 6])
def test_a_task_runs_row_by_row_over_a_state(program, base):
    """Running sums: a state of two copies, of which every row reads one and writes the other."""
    buffers = _native.Buffers([5 * 48, 2 * 48])
    rows = np.arange(30, dtype=np.int64).reshape(5, 2, 3)
    state = np.zeros((2, 2, 3), np.int64)
    state[base % 2] = 100
    given = _native.Region.of(rows)
    states = _native.Region.of(state, writable=True)
    task = T(
        0,
        [B(2, [2, 3], offset_per_row=48), B(3, [2, 3], copy_bytes=48)],
        [B(3, [2, 3], copy_bytes=48, first_copy=1)],
        num_rows=5,
    )
    areas = [*regions(buffers), given, states]
    _native.Execution([program.load("add_int64")], areas, [task], [[0]]).run(base)
    sums = 100 + rows.cumsum(0)
    np.testing.assert_array_equal(state[(base + 5) % 2], sums[-1])
    np.testing.assert_array_equal(state[(base + 4) % 2], sums[-2])


def test_rows_that_are_refused(program):
    buffers = _native.Buffers([4 * 48, 2 * 48])
    instance = [program.load("add_int64")]

    def refused(num_rows=5, **first):
        bindings = [B(0, [2, 3], **first), B(1, [2, 3], copy_bytes=48)]
        task = T(0, bindings, [B(1, [2, 3], copy_bytes=48, first_copy=1)], num_rows=num_rows)
        with pytest.raises(_native.Error) as error:
            _native.Execution(instance, regions(buffers), [task], [[0]])
        return str(error.value)

    assert "needs 48 bytes at offset 0 of buffer 0" in refused(offset_per_row=48)
    assert "out of range" in refused(num_rows=4, offset_per_row=-48)
    assert "out of range" in refused(first_copy=2)
    assert "runs 0 rows" in refused(num_rows=0)
    assert "needs 48 bytes" in refused(num_rows=1, copy_bytes=3 * 48 + 1)
