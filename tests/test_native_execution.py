"""Replaying schedules natively, on small real methods. Knows nothing of how schedules are made."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest

_native = pytest.importorskip("doubleweave._native")
torch = pytest.importorskip("torch")
pytest.importorskip("executorch.exir")

from native_toys import HEAD_DIM, HEADS, KV_HEADS, H, expected, rows_of, run, toy_modules  # noqa: E402

pytestmark = pytest.mark.executorch


@pytest.fixture(scope="module")
def program(toy_path):
    return _native.Program(str(toy_path))


@pytest.fixture(autouse=True)
def one_thread():
    _native.set_intra_op_threads(1)


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
    from doubleweave.ops import attention_reference

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
        (lambda: build([[0, 1, 2, 3]], threads=99), "threads_per_worker must be between"),
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
