"""Operators, threads, caches and buffers of the native module. Knows nothing of schedules."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from doubleweave import _native
from native_toys import HEAD_DIM, HEADS, KV_HEADS, expected, rows_of, run, toy_modules

# Operators


@pytest.mark.parametrize(("num_rows", "num_keys"), [(1, 1), (5, 9), (128, 128), (1, 4096), (3, 300)])
@pytest.mark.parametrize("num_threads", [1, _native.max_threads()])
def test_attention_method(program, num_rows, num_keys, num_threads):
    from doubleweave.compiler.graph.ops import attention_reference

    _native.set_intra_op_threads(num_threads)
    q, k, v = (
        rows_of(num_rows, HEADS * HEAD_DIM),
        *(rows_of(num_keys, KV_HEADS * HEAD_DIM, s) for s in (1, 2)),
    )
    out = np.empty_like(q)
    program.load("attention").run([q, k, v], [out])
    scale = HEAD_DIM**-0.5
    want = attention_reference(*map(torch.from_numpy, (q, k, v)), HEADS, KV_HEADS, scale, 0, 0.0)
    np.testing.assert_allclose(out, want.numpy(), rtol=1e-4, atol=1e-5)
    direct = np.empty_like(q)
    _native.attention(q, k, v, direct, num_heads=HEADS, num_kv_heads=KV_HEADS, scale=scale)
    np.testing.assert_array_equal(direct, out)


def test_attention_refuses_more_queries_than_keys(program):
    q, kv = rows_of(9, HEADS * HEAD_DIM), rows_of(5, KV_HEADS * HEAD_DIM)
    with pytest.raises(_native.Error, match="at least as many keys as queries"):
        program.load("attention").run([q, kv, kv], [np.empty_like(q)])


@pytest.mark.parametrize("num_rows", [1, 7])
def test_rotary_method(program, num_rows):
    from doubleweave.compiler.graph.ops import rotary_reference

    x, cos, sin = rows_of(num_rows, HEADS * HEAD_DIM), *(rows_of(num_rows, HEAD_DIM, s) for s in (1, 2))
    out = np.empty_like(x)
    program.load("rotary").run([x, cos, sin], [out])
    want = rotary_reference(*map(torch.from_numpy, (x, cos, sin)), HEADS)
    np.testing.assert_allclose(out, want.numpy(), rtol=1e-6, atol=1e-6)


# Threads


def test_switching_thread_counts_keeps_every_bit(program):
    for name in ("mlp", "int8"):
        instance = program.load(name)
        want = {n: run(instance, rows_of(n)) for n in (1, 37, 128)}
        for step in range(40):
            _native.set_intra_op_threads((1, _native.pool_threads())[step % 2])
            for num_rows in (1, 128, 128, 37, 1):
                np.testing.assert_array_equal(run(instance, rows_of(num_rows)), want[num_rows])


def test_results_do_not_depend_on_the_threads_of_the_first_run(program):
    most = _native.pool_threads()
    for name in ("mlp", "int8"):
        for _ in range(5):
            instance, x = program.load(name), rows_of(128)
            outs = [np.empty_like(x) for _ in range(4)]
            for out, threads in zip(outs, (1, most, 1, most), strict=True):
                instance.run([x], [out], threads=threads)
            np.testing.assert_allclose(outs[0], expected(toy_modules()[name], x), rtol=1e-3, atol=1e-4)
            for out in outs[1:]:
                np.testing.assert_array_equal(out, outs[0])


def test_thread_count_out_of_range(program):
    for count in (0, -1, _native.max_threads() + 1):
        for set_threads in (_native.set_intra_op_threads, _native.set_pool_threads):
            with pytest.raises(_native.Error, match=f"between 1 and {_native.max_threads()}"):
                set_threads(count)
    assert _native.intra_op_threads() == 1
    _native.set_pool_threads(1)  # fits any pool
    assert _native.pool_threads() == _native.max_threads()


SMALLER_POOL = """
import sys
import numpy as np
from doubleweave import _native
from native_toys import expected, rows_of, run, toy_modules

most = _native.max_threads()
fewer = max(1, most - 1)
_native.set_pool_threads(fewer)
program = _native.Program(sys.argv[1])
for name in ("mlp", "int8"):
    instance = program.load(name)
    for step in range(60):
        _native.set_intra_op_threads((1, fewer)[step % 2])
        for num_rows in (1, 37, 128):
            x = rows_of(num_rows)
            np.testing.assert_allclose(run(instance, x), expected(toy_modules()[name], x), rtol=1e-3, atol=1e-4)
if fewer > 1:
    for ask in (_native.set_pool_threads, _native.set_intra_op_threads):
        try:
            ask(most)
        except _native.Error as error:
            assert f"1 or {fewer}" in str(error), error
        else:
            raise AssertionError("a loaded method keeps its pool")
    del instance
    _native.set_pool_threads(most)
    _native.set_intra_op_threads(most)
print("pool", fewer)
"""


def test_fewer_threads_than_cores_take_a_pool_of_that_size(toy_path):
    """With fewer threads than its pool has, ExecuTorch's pthreadpool loses work (three or more cores show it)."""
    done = subprocess.run(
        [sys.executable, "-c", SMALLER_POOL, str(toy_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pool {max(1, _native.max_threads() - 1)}\n"


@pytest.mark.parametrize("groups", [(-1, -1), (0, 0), (0, 1)])
def test_two_threads_run_two_instances_at_once(program, groups):
    instances = [program.load(name, group) for name, group in zip(("mlp", "int8"), groups, strict=True)]
    want = [run(instance, rows_of(64)) for instance in instances]
    wrong = []

    def work(i: int) -> None:
        for _ in range(200):
            if not np.array_equal(run(instances[i], rows_of(64)), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_instance_on_two_threads_is_refused(program):
    instance = program.load("heavy")
    x, errors = rows_of(128, 256), []

    def work() -> None:
        for _ in range(50):
            try:
                run(instance, x)
            except _native.Error as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors
    assert all("in use on another thread" in error for error in errors)


# Caches and buffers


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.alone
def test_cache_memory_grows_and_shrinks_with_its_tokens():
    row_bytes, num_tokens = 64 << 10, 512
    cache = _native.KvCache([row_bytes] * 2, max_tokens=100_000)  # 12 GB of addresses
    before = resident_bytes()
    for entry in range(2):
        cache.view(entry, num_tokens)[:] = 1
    cache.note_length(num_tokens)
    committed = 2 * num_tokens * row_bytes
    assert cache.committed_bytes == committed
    assert resident_bytes() - before == pytest.approx(committed, rel=0.1)
    cache.truncate(num_tokens // 4)
    assert cache.length == num_tokens // 4
    assert cache.committed_bytes == committed // 4
    assert cache.peak_bytes == committed
    assert resident_bytes() - before == pytest.approx(committed // 4, rel=0.2)
    assert (cache.view(1, num_tokens // 4) == 1).all()
    assert (cache.view(1, num_tokens)[num_tokens // 4 :] == 0).all()


def test_cache_errors():
    cache = _native.KvCache([256, 128], max_tokens=10, slack_tokens=4)
    assert cache.view(1, 14, "int16").shape == (14, 64)
    with pytest.raises(_native.Error, match="holds up to 10 tokens, but 11"):
        cache.note_length(11)
    with pytest.raises(_native.Error, match="4 rows of slack, but 5"):
        cache.note_length(10, 5)
    with pytest.raises(_native.Error, match="cannot be truncated to 3"):
        cache.truncate(3)
    with pytest.raises(_native.Error, match="does not fit entry 0"):
        cache.view(0, 15)
    with pytest.raises(_native.Error, match="has 2 entries, but entry 2"):
        cache.region(2)
    with pytest.raises(ValueError, match="no dtype 'float31'"):
        cache.view(0, 1, "float31")
    for arguments in ([4], 0, 0), ([0], 1, 0), ([1 << 62], 100, 0):
        with pytest.raises(_native.Error, match="cache"):
            _native.KvCache(*arguments)


def test_buffers_are_aligned_and_zeroed():
    buffers = _native.Buffers([100, 0, 4096])
    assert len(buffers) == 3
    assert [buffers.bytes(i) for i in range(3)] == [100, 0, 4096]
    assert all(buffers.address(i) % 64 == 0 for i in range(3))
    view = buffers.view(2, [2, 16, 32])
    assert view.shape == (2, 16, 32)
    assert not view.any()
    with pytest.raises(_native.Error, match="does not fit buffer 0"):
        buffers.view(0, [26])
    with pytest.raises(_native.Error, match="3 buffers, but buffer 3"):
        buffers.region(3)
    del buffers
    view += 1  # the view keeps the memory alive
