"""Submitted calls: futures as arguments, errors, order, devices at once, and what happens when nobody waits."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, wait

import numpy as np
import pytest

import doubleweave
from doubleweave import Dynamic, Result, Static
from doubleweave.errors import InputError

TIMEOUT = 60
SIDE = 640
LARGE = np.full((SIDE, SIDE), 1e-3, "f4")


@pytest.fixture(scope="module")
def folder(made_once):
    """Two devices: `slow` takes some tens of milliseconds on the "npu", the others next to nothing on the "cpu"."""
    import torch
    from torch.export import Dim

    class Slow(torch.nn.Module):
        def forward(self, x):
            for _ in range(6):
                x = torch.tanh(x @ x)
            return x

    class Pair(torch.nn.Module):
        def forward(self, x, y):
            return x + y, x - y

    class Many(torch.nn.Module):
        def forward(self, xs, named, *, last):
            return {"sum": xs[0] + xs[1] + named["a"] + named["b"], "last": last * 10}

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slow, self.pair, self.many = Slow(), Pair(), Many()

        def forward(self, x, large):
            total, difference = self.pair(x, x)
            return self.many([total, difference], {"a": x, "b": x}, last=x), self.slow(large)

    rows = Dim("T", min=1, max=64)

    def make(out):
        doubleweave.compile(
            Net(),
            (torch.ones(3, 2), torch.from_numpy(LARGE)),
            dynamic_shapes={"x": {0: rows}, "large": None},
            policy={"slow": Static(device="npu"), "pair": Dynamic(), "many": Dynamic()},
            out=out,
        )

    return made_once("futures", make)


@pytest.fixture(scope="module")
def program(folder):
    program = doubleweave.open(folder)
    program.methods["slow"](LARGE)  # loaded
    return program


@pytest.fixture
def slow(program):
    return program.methods["slow"]


@pytest.fixture
def pair(program):
    return program.methods["pair"]


@pytest.fixture
def many(program):
    return program.methods["many"]


def full(number, rows=3):
    return np.full((rows, 2), number, "f4")


def number_in(array):
    assert (array == array[0, 0]).all()
    return array[0, 0].item()


def gate_of(gate, number):
    """A future of a tensor that is there once the gate is open."""
    found = Future()
    gate.add_done_callback(lambda _: found.set_result(full(number)))
    return found


@contextlib.contextmanager
def held(method, *args):
    """Keep the worker of a method's device busy for as long as this lasts."""
    gate, is_held, is_over = Future(), threading.Event(), threading.Event()
    future = method.submit(*args, after=[gate])
    future.add_done_callback(lambda _: (is_held.set(), is_over.wait(TIMEOUT)))  # on the worker
    gate.set_result(None)
    assert is_held.wait(TIMEOUT)
    try:
        yield
    finally:
        is_over.set()


def test_submit_returns_at_once(slow):
    with held(slow, LARGE):
        futures = [slow.submit(LARGE) for _ in range(3)]
        assert not any(future.done() or future.running() for future in futures)
    assert all(isinstance(future, Result) and isinstance(future, Future) for future in futures)
    wanted = slow(LARGE)
    assert all(np.allclose(future.result(TIMEOUT), wanted) for future in futures)


def test_the_whole_module_can_be_submitted(program):
    found, large = program.submit(full(1), LARGE).result(TIMEOUT)
    assert number_in(found["sum"]) == 4
    assert np.allclose(large, program.methods["slow"](LARGE))


def test_a_future_as_an_argument(pair):
    first = pair.submit(full(5), full(3))
    assert [number_in(part) for part in first.result(TIMEOUT)] == [8, 2]
    second = pair.submit(first[0], first[1])
    third = pair.submit(y=second[0], x=second[1])
    assert [number_in(part) for part in third.result(TIMEOUT)] == [16, -4]


def test_futures_inside_lists_dicts_and_keywords(pair, many):
    one, two = pair.submit(full(1), full(0)), pair.submit(full(2), full(0))
    found = many.submit([one[0], full(5)], {"a": two[0], "b": one[1]}, last=two[1])
    assert {key: number_in(value) for key, value in found.result(TIMEOUT).items()} == {"sum": 9, "last": 20}
    again = many.submit([found["sum"], found["last"]], {"a": found["sum"], "b": full(0)}, last=found["sum"])
    assert {key: number_in(value) for key, value in again.result(TIMEOUT).items()} == {"sum": 38, "last": 90}


def test_futures_from_elsewhere_are_waited_for(pair):
    foreign = Future()
    found = pair.submit(foreign, full(1))
    time.sleep(0.02)
    assert not found.done()
    assert not found.running()
    foreign.set_result(full(4))
    assert number_in(found.result(TIMEOUT)[0]) == 5


def test_a_part_of_a_result(pair, many):
    future = pair.submit(full(5), full(3))
    assert isinstance(future[1], Result)
    assert number_in(future[1].result(TIMEOUT)) == 2
    assert number_in(future[-1].result(TIMEOUT)) == 2
    assert number_in(future[1][0:1].result(TIMEOUT)) == 2  # a part of a part
    assert [number_in(part) for part in future[:].result(TIMEOUT)] == [8, 2]
    named = many.submit([full(1), full(1)], {"a": full(1), "b": full(1)}, last=full(1))
    assert number_in(named["last"].result(TIMEOUT)) == 10
    with pytest.raises(IndexError):
        future[2].result(TIMEOUT)
    with pytest.raises(KeyError):
        named["first"].result(TIMEOUT)


def test_results_into_given_memory(pair, slow):
    out = [full(0), full(0)]
    future = pair.submit(full(5), full(3), out=out)
    for found, given in zip(future.result(TIMEOUT), out, strict=True):
        assert found.ctypes.data == given.ctypes.data
    assert [number_in(array) for array in out] == [8, 2]
    # A future may also be where to write.
    place = Future()
    future = pair.submit(full(1), full(1), out=[place, full(0)])
    place.set_result(full(0))
    assert number_in(future.result(TIMEOUT)[0]) == number_in(place.result()) == 2


def test_after_waits_for_more_than_the_arguments(pair, slow):
    before = slow.submit(LARGE)
    after = pair.submit(full(1), full(1), after=[before])
    after.result(TIMEOUT)
    assert before.done()
    failed = pair.submit(full(1))
    with pytest.raises(InputError):
        pair.submit(full(1), full(1), after=[failed]).result(TIMEOUT)


def test_lists_may_be_filled_further_after_submit(pair, many):
    gate, after, xs = Future(), [], [full(1), full(2)]
    after.append(gate)
    first = pair.submit(full(1), full(1), after=after)
    second = many.submit(xs, {"a": full(0), "b": full(0)}, last=full(1))
    waiting = many.submit(xs, {"a": full(0), "b": gate_of(gate, 4)}, last=full(1))
    after.append(pair.submit(first[0], full(1)))  # itself waits for the first
    xs[0] = full(7)
    gate.set_result(None)
    assert number_in(first.result(TIMEOUT)[0]) == 2
    assert number_in(second.result(TIMEOUT)["sum"]) == 3
    assert number_in(waiting.result(TIMEOUT)["sum"]) == 7


def test_torch_tensors_through_futures(pair):
    import torch

    future = pair.submit(torch.ones(2, 2), torch.ones(2, 2))
    found = pair.submit(future[0], future[1]).result(TIMEOUT)
    assert all(isinstance(tensor, torch.Tensor) for tensor in found)
    assert torch.equal(found[0], torch.full((2, 2), 2.0))


def test_results_come_in_order_on_one_device(pair):
    ended = []
    futures = []
    with held(pair, full(1), full(1)):
        for number in range(50):
            futures.append(pair.submit(full(number), full(0)))
            futures[-1].add_done_callback(lambda _, number=number: ended.append(number))
    assert [number_in(future.result(TIMEOUT)[0]) for future in futures] == list(range(50))
    pair.submit(full(1), full(1)).result(TIMEOUT)  # callbacks come after the result
    assert ended == list(range(50))


def test_what_waits_for_another_device_lets_others_pass(pair, slow):
    with held(slow, LARGE):
        first = slow.submit(LARGE)
        waiting = pair.submit(full(1), full(1), after=[first])
        pair.submit(full(2), full(2)).result(TIMEOUT)
        assert not waiting.done()
    waiting.result(TIMEOUT)
    assert first.done()


def test_errors_of_a_call_are_its_own(pair):
    failed = pair.submit(full(1), full(1, rows=2))
    fine = pair.submit(full(1), full(1))
    with pytest.raises(InputError, match=r"pair, y: found shape \[2, 2\]"):
        failed.result(TIMEOUT)
    assert isinstance(failed.exception(), InputError)
    assert number_in(fine.result(TIMEOUT)[0]) == 2


def test_what_depends_on_an_error_gets_that_very_error(pair, many):
    failed = pair.submit(full(1))
    part = failed[0]
    direct = pair.submit(failed[0], full(1))
    nested = many.submit([full(1), direct[0]], {"a": full(1), "b": direct[1]}, last=full(1))
    for future in (failed, part, direct, nested, nested["sum"]):
        assert future.exception(TIMEOUT) is failed.exception()
    with pytest.raises(InputError, match="missing a required argument: 'y'"):
        nested.result(TIMEOUT)


def test_errors_from_elsewhere_reach_dependents(pair):
    foreign = Future()
    future = pair.submit(foreign, full(1))
    error = RuntimeError("elsewhere")
    foreign.set_exception(error)
    assert future.exception(TIMEOUT) is error


def test_what_waits_can_be_cancelled(pair):
    foreign = Future()
    waiting = pair.submit(foreign, full(1))
    behind = pair.submit(waiting[0], full(1))
    assert waiting.cancel()
    assert waiting.cancelled()
    with pytest.raises(CancelledError):
        waiting.result(TIMEOUT)
    with pytest.raises(CancelledError):
        behind.result(TIMEOUT)
    foreign.set_result(full(1))
    assert number_in(pair.submit(full(1), full(1)).result(TIMEOUT)[0]) == 2  # the worker goes on
    assert waiting.cancelled()


def test_what_is_queued_can_be_cancelled_and_what_runs_cannot(slow):
    with held(slow, LARGE):
        running, queued, last = (slow.submit(LARGE) for _ in range(3))
        assert queued.cancel()
    while not (running.running() or running.done()):
        time.sleep(0.001)
    assert not running.cancel()
    assert last.result(TIMEOUT).shape == running.result(TIMEOUT).shape == LARGE.shape
    assert queued.cancelled()


def test_a_cancelled_part_leaves_the_whole_alone(pair, caplog):
    with held(pair, full(1), full(1)):
        future = pair.submit(full(1), full(1))
        part, other = future[0], future[1]
        assert part.cancel()
    assert number_in(other.result(TIMEOUT)) == 0
    assert number_in(future.result(TIMEOUT)[0]) == 2
    assert part.cancelled()
    assert not caplog.records


@pytest.mark.alone
def test_two_devices_run_at_the_same_time(program, slow, pair):
    assert (slow.device, pair.device) == ("npu", "cpu")
    # If they took turns, the slow one, which begins first, would end first in every try.
    for _ in range(20):
        ended = {}
        long = slow.submit(LARGE)
        long.add_done_callback(lambda _, ended=ended: ended.setdefault("long", time.perf_counter_ns()))
        while not long.running():
            time.sleep(0.0005)
        time.sleep(0.005)  # inside by now
        short = pair.submit(full(1), full(1))
        short.add_done_callback(lambda _, ended=ended: ended.setdefault("short", time.perf_counter_ns()))
        wait([long, short], TIMEOUT)
        long.result(0), short.result(0)
        if ended["short"] < ended["long"]:
            return
    pytest.fail("one device waits for the other")


def test_each_device_has_one_worker(program, slow, pair):
    seen = collections.defaultdict(set)

    def note(device):
        return lambda _: seen[device].add(threading.current_thread().name)

    # Done before a callback is added, a future calls it here; so each waits for one that is done later.
    gate = Future()
    futures = []
    for device, method, args in (("npu", slow, (LARGE,)), ("cpu", pair, (full(1), full(1)))):
        for _ in range(3):
            futures.append(method.submit(*args, after=[gate]))
            futures[-1].add_done_callback(note(device))
    gate.set_result(None)
    wait(futures, TIMEOUT)
    assert {device: len(names) for device, names in seen.items()} == {"npu": 1, "cpu": 1}
    assert seen["npu"].isdisjoint(seen["cpu"])


def test_many_tiny_calls(pair):
    futures = [pair.submit(full(number), full(1)) for number in range(500)]
    assert [number_in(future.result(TIMEOUT)[0]) for future in futures] == list(range(1, 501))


def test_a_long_chain(pair):
    future = pair.submit(full(0), full(1))
    for _ in range(300):
        future = pair.submit(future[0], full(1))
    assert number_in(future.result(TIMEOUT)[0]) == 301


def test_submits_from_several_threads(pair, slow):
    errors = []

    def submit(seed):
        try:
            futures = [pair.submit(full(seed + number), full(0)) for number in range(100)]
            slow.submit(LARGE).result(TIMEOUT)
            for number, future in enumerate(futures):
                assert number_in(future.result(TIMEOUT)[0]) == seed + number
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(1000 * i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert not errors


def test_direct_calls_between_submitted_ones(pair, slow):
    futures = [slow.submit(LARGE) for _ in range(4)]
    for number in range(20):
        assert number_in(pair(full(number), full(1))[0]) == number + 1
    assert np.allclose(slow(LARGE), futures[-1].result(TIMEOUT))


def test_a_program_may_go_before_its_futures(folder):
    program = doubleweave.open(folder)
    futures = [program.methods["slow"].submit(LARGE) for _ in range(3)]
    futures += [program.methods["pair"].submit(full(1), full(1)) for _ in range(3)]
    futures.append(program.submit(full(1), LARGE))
    del program
    gc.collect()
    done, pending = wait(futures, TIMEOUT)
    assert not pending
    assert all(future.exception() is None for future in done)


def test_a_program_may_go_with_its_futures(folder):
    before = set(threading.enumerate())
    program = doubleweave.open(folder)
    for _ in range(3):
        program.methods["slow"].submit(LARGE)
        program.methods["pair"].submit(full(1), full(1))
    workers = {t for t in threading.enumerate() if t.name.startswith("doubleweave")} - before
    assert len(workers) == 2
    del program
    gc.collect()
    for worker in workers:  # they end when what was submitted is done
        worker.join(TIMEOUT)
        assert not worker.is_alive()


# Python says so where it drops what an alarm's handler raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_at_any_moment_a_method_can_be_called_again(pair):
    """What a signal's handler raises (ctrl-C, most often) may come between any two steps of a call."""

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    pair(full(1), full(1))  # loaded: the threads that load are the standard library's
    dice = random.Random(0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(2000):
            # An alarm may come where Python drops what its handler raises (while it lets an object go).
            deadline = time.monotonic() + 1
            with contextlib.suppress(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, dice.uniform(1e-5, 3e-4))
                while time.monotonic() < deadline:
                    pair(full(1), full(1))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert number_in(pair.submit(full(1), full(2)).result(TIMEOUT)[0]) == 3


def leave(folder, ending):
    """Run a process that submits calls and ends without waiting for them."""
    code = f"""
import os, signal, sys, time
import numpy as np
import doubleweave
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in what started the tests
program = doubleweave.open(sys.argv[1])
slow, pair = program.methods["slow"], program.methods["pair"]
large, small = np.full(({SIDE}, {SIDE}), 1e-3, "f4"), np.ones((3, 2), "f4")
slow(large)
futures = [slow.submit(large) for _ in range(5)] + [pair.submit(small, small) for _ in range(5)]
print("submitted", flush=True)
{ending}
"""
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=TIMEOUT
    )


def test_a_process_ends_with_futures_pending(folder):
    done = leave(folder, "")
    assert (done.returncode, done.stdout, done.stderr) == (0, "submitted\n", "")


def test_a_process_ends_when_an_error_is_raised_with_futures_pending(folder):
    done = leave(folder, "raise SystemExit(3)")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(
    "where", ["time.sleep(30)", "[future.result() for future in futures * 100]", "slow(large)"]
)
def test_ctrl_c_ends_a_process_with_futures_pending(folder, where):
    ending = f"""
import threading
threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
while True:
    {where}
"""
    done = leave(folder, ending)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "submitted\n"
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert done.stderr.count("Traceback") == 1, done.stderr


def test_what_waits_when_the_program_goes_still_runs(folder, caplog):
    caplog.set_level(logging.CRITICAL, "concurrent.futures")
    program = doubleweave.open(folder)
    pair = program.methods["pair"]
    foreign = Future()
    pair.submit(full(1), full(1)).result(TIMEOUT)
    future = pair.submit(foreign, full(1))
    del program
    gc.collect()
    foreign.set_result(full(1))
    assert number_in(future.result(5)[0]) == 2


def test_a_method_that_outlives_its_program_can_be_submitted(folder):
    program = doubleweave.open(folder)
    pair = program.methods["pair"]
    pair.submit(full(1), full(1)).result(TIMEOUT)
    del program
    gc.collect()
    assert number_in(pair.submit(full(1), full(1)).result(TIMEOUT)[0]) == 2


def test_a_future_cannot_be_iterated(pair):
    # It has parts, but says nowhere how many.
    future = pair.submit(full(1), full(1))
    for use in (iter, list, lambda f: [*f], lambda f: pair(*f), lambda f: 1 in f):
        with pytest.raises(TypeError, match=r"iterable|container"):
            use(future)


def test_futures_inside_other_containers(pair, many):
    one = pair.submit(full(1), full(0))
    named = collections.OrderedDict(a=one[0], b=one[0])
    found = many.submit([one[0], one[0]], named, last=one[0])
    assert number_in(found.result(TIMEOUT)["sum"]) == 4
    point = collections.namedtuple("point", "u v")
    with pytest.raises(InputError, match="xs: found a point of 2, expected a list of 2"):
        many.submit(point(one[0], one[1]), named, last=one[0]).result(TIMEOUT)


def test_a_cancelled_part_of_what_fails_is_quiet(pair, caplog):
    with held(pair, full(1), full(1)):
        failed = pair.submit(full(1))
        assert failed[0].cancel()
    assert isinstance(failed.exception(TIMEOUT), InputError)
    pair.submit(full(1), full(1)).result(TIMEOUT)  # its callbacks have run
    assert not caplog.records


def test_a_process_ends_quietly_with_a_chain_pending(folder):
    done = leave(folder, "chain = pair.submit(small, small, after=[slow.submit(large)])")
    assert (done.returncode, done.stderr) == (0, "")
