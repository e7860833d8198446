"""Calls of a compiled module and of its pieces: signatures, results that the caller owns, several threads."""

from __future__ import annotations

import gc
import inspect
import itertools
import threading
import time

import numpy as np
import pytest

import doubleweave
from doubleweave import Dynamic, Static
from doubleweave.errors import DoubleweaveError, InputError, SplitError

TIMEOUT = 60  # for what would otherwise wait for ever
SIDE = 640


@pytest.fixture(scope="module")
def program():
    """A module with a dynamic method, one with many kinds of parameters, and one that takes its time."""
    import torch
    from torch.export import Dim

    class MatMul(torch.nn.Module):
        def forward(self, a, b):
            return a @ b

    class Gate(torch.nn.Module):
        def forward(self, x, scale=3.0, *, bias=None, flip=False):
            return (x * scale, -x) if bias is None else (x * scale + bias, -x)

    class Slow(torch.nn.Module):
        def forward(self, x):
            for _ in range(6):
                x = torch.tanh(x @ x)
            return x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.MatMul, self.gate, self.slow = MatMul(), Gate(), Slow()

        def forward(self, x, y, large, power=1, *, mode="plain"):
            product = self.MatMul(self.MatMul(x, y), x)
            scaled, negated = self.gate(product, bias=x)
            return {"scaled": scaled, "rest": [negated, self.slow(large)]}

    m, k, n = (Dim(name, min=1, max=10) for name in "mkn")
    return doubleweave.compile(
        Net(),
        (torch.ones(3, 6), torch.ones(6, 3), torch.ones(SIDE, SIDE)),
        policy={
            "MatMul": Dynamic({"a": {0: m, 1: k}, "b": {0: k, 1: n}}),
            "gate": Dynamic(),
            "slow": Dynamic(),
        },
    )


class Numbers:
    """Arguments of the program above, and what it gives for them."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        self.x, self.y = (random.standard_normal(s).astype("f4") for s in ((3, 6), (6, 3)))
        self.large = (random.standard_normal((SIDE, SIDE)) / SIDE).astype("f4")
        self.args = (self.x, self.y, self.large)

    def check(self, found):
        product = self.x @ self.y @ self.x
        np.testing.assert_allclose(found["scaled"], 3 * product + self.x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["rest"][0], -product, rtol=1e-4, atol=1e-4)


def together(*calls):
    """Run each in a thread of its own, all at once; raises what one of them raised, or when one does not end."""
    barrier = threading.Barrier(len(calls))
    errors = []

    def run(call):
        try:
            barrier.wait(TIMEOUT)
            call()
        except BaseException as error:
            errors.append(error)

    # Daemons: a deadlock must not keep the whole run from ending.
    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    if errors:
        raise errors[0]


def test_signatures_are_the_modules_own(program):
    methods = program.methods
    assert str(inspect.signature(methods["MatMul"])) == "(a, b)"
    assert str(inspect.signature(methods["gate"])) == "(x, scale=3.0, *, bias=None, flip=False)"
    assert str(inspect.signature(methods["slow"])) == "(x)"
    assert methods["MatMul"].__name__ == "MatMul"
    assert repr(methods["MatMul"]) == (
        "<method MatMul(a: float32[m, k], b: float32[k, n]) -> float32[m, n], "
        "m in 1..10, k in 1..10, n in 1..10>"
    )
    assert {"MatMul", "gate", "slow"} <= set(methods)
    assert repr(program) == f"<program Net: {', '.join(methods)}>"


def test_the_whole_module_and_each_method_take_arguments_as_the_module_does(program):
    numbers = Numbers()
    for found in (
        program(*numbers.args),
        program(numbers.x, large=numbers.large, y=numbers.y),
        program(large=numbers.large, y=numbers.y, x=numbers.x, mode="plain"),
    ):
        assert list(found) == ["scaled", "rest"]
        assert type(found["rest"]) is list
        numbers.check(found)
    matmul = program.methods["MatMul"]
    for rows, inner, columns in ((1, 1, 1), (7, 2, 9), (10, 10, 10)):
        a, b = np.ones((rows, inner), "f4"), np.full((inner, columns), 2, "f4")
        for product in (matmul(a, b), matmul(b=b, a=a), matmul(a, b=b)):
            assert product.shape == (rows, columns)
            assert (product == 2 * inner).all()
    gate, x = program.methods["gate"], numbers.x
    for scaled, negated in (gate(x, bias=x), gate(x, 3.0, bias=x, flip=False), gate(scale=3.0, bias=x, x=x)):
        np.testing.assert_allclose(scaled, 4 * x, rtol=1e-6)
        assert np.array_equal(negated, -x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p, n: p(n.x, n.y),
            r"Net: missing a required argument: 'large'; expected Net\(x, y, large, power=1",
        ),
        (lambda p, n: p(*n.args, mode="other"), "Net, mode: found 'other', expected 'plain'"),
        (lambda p, n: p(*n.args, 2), r"Net, power: found 2, expected 1 \(constants are compiled in\)"),
        (lambda p, n: p(*n.args, color=1), "Net: got an unexpected keyword argument 'color'"),
        (lambda p, n: p(n.y, n.x, n.large), r"Net, x: found shape \[6, 3\], expected \[3, 6\]"),
        (
            lambda p, n: p.methods["MatMul"](n.x),
            r"MatMul: missing a required argument: 'b'; expected MatMul\(a, b\)",
        ),
        (lambda p, n: p.methods["MatMul"](n.x, n.y, n.y), "MatMul: too many positional arguments"),
        (lambda p, n: p.methods["MatMul"](n.x, a=n.y), "MatMul: multiple values for argument 'a'"),
        (
            lambda p, n: p.methods["MatMul"](n.x, n.x),
            r"MatMul, b: found shape \[3, 6\], expected \[k, n\] with k in 1\.\.10, n in 1\.\.10, where k = 6",
        ),
        (lambda p, n: p.methods["gate"](n.x), "gate, bias: found None, expected a tensor"),
        (lambda p, n: p.methods["gate"](n.x, 2.0, bias=n.x), r"gate, scale: found 2\.0, expected 3\.0"),
        (lambda p, n: p.methods["gate"](n.x, 3.0, n.x), "gate: too many positional arguments"),
    ],
)
def test_calls_that_do_not_fit_are_refused(program, call, message):
    with pytest.raises(InputError, match=message):
        call(program, Numbers())


def test_results_are_not_overwritten_by_the_next_call(program):
    first, second = Numbers(1), Numbers(2)
    found = program(*first.args)
    matmul = program.methods["MatMul"](first.x, first.y)
    kept = [found["scaled"].copy(), found["rest"][1].copy(), matmul.copy()]
    for _ in range(3):
        program(*second.args)
        program.methods["MatMul"](second.x, second.y)
        program.methods["slow"](second.large)
    first.check(found)
    for now, before in zip((found["scaled"], found["rest"][1], matmul), kept, strict=True):
        assert np.array_equal(now, before)


def test_one_method_from_several_threads_takes_turns(program):
    matmul = program.methods["MatMul"]

    def caller(seed):
        random = np.random.default_rng(seed)
        out = np.empty(100, "f4")

        def call():
            for turn in range(60):
                rows, inner, columns = random.integers(1, 11, 3)
                a = random.integers(-9, 10, (rows, inner)).astype("f4")
                b = random.integers(-9, 10, (inner, columns)).astype("f4")
                found = matmul(a, b, out=out) if turn % 3 == 0 else matmul(a, b)
                assert np.array_equal(found, a @ b)  # whole numbers: exact

        return call

    together(*map(caller, range(4)))


def test_the_whole_module_from_several_threads(program):
    numbers = [Numbers(seed) for seed in range(3)]

    def call(mine):
        for _ in range(2):
            mine.check(program(*mine.args))

    together(*(lambda mine=mine: call(mine) for mine in numbers))


def test_refused_and_right_calls_from_several_threads(program):
    matmul, numbers = program.methods["MatMul"], Numbers()

    def refused():
        for _ in range(50):
            with pytest.raises(InputError):
                matmul(numbers.x, numbers.x)

    def right():
        for _ in range(50):
            np.testing.assert_allclose(matmul(numbers.x, numbers.y), numbers.x @ numbers.y, atol=1e-5)

    together(refused, right, refused, right)


@pytest.fixture
def one_thread(program):
    """A method that uses several threads holds all of them; with one each, methods do not meet."""
    before = program.threads
    program.threads = 1
    yield
    program.threads = before


@pytest.mark.alone
def test_other_threads_go_on_while_a_method_runs(program, one_thread):
    slow, large = program.methods["slow"], Numbers().large
    slow(large)
    stamps = []
    is_over = threading.Event()

    def stamp():
        while not is_over.is_set():
            stamps.append(time.perf_counter())

    thread = threading.Thread(target=stamp, daemon=True)
    thread.start()
    try:
        # Without the GIL released nothing is stamped for as long as the method runs, in every try.
        for _ in range(20):
            begin = time.perf_counter()
            slow(large)
            end = time.perf_counter()
            during = [begin, *(s for s in stamps if begin < s < end), end]
            if max(b - a for a, b in itertools.pairwise(during)) < (end - begin) / 2:
                return
            stamps.clear()
    finally:
        is_over.set()
        thread.join(TIMEOUT)
    pytest.fail("no other thread went on while a method ran")


@pytest.mark.alone
def test_two_methods_run_at_the_same_time(program, one_thread):
    slow, matmul, numbers = program.methods["slow"], program.methods["MatMul"], Numbers()
    slow(numbers.large)
    matmul(numbers.x, numbers.y)
    # If they took turns, the slow one, which begins first, would be done first in every try.
    for _ in range(20):
        thread = threading.Thread(target=slow, args=(numbers.large,), daemon=True)
        thread.start()
        time.sleep(0.005)
        matmul(numbers.x, numbers.y)
        is_inside = thread.is_alive()
        thread.join(TIMEOUT)
        if is_inside:
            return
    pytest.fail("a method waits for another one")


@pytest.mark.parametrize("threads", [0, -1, 1.0, True, None, "2", 10_000])
def test_threads_are_checked(program, threads):
    with pytest.raises(InputError, match=r"threads: found .*, expected 1 to"):
        program.threads = threads


@pytest.fixture(scope="module")
def counting_path(made_once):
    """A module that counts its calls, over one that counts its own."""
    import torch

    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(1, dtype=torch.int64))

        def forward(self, x):
            self.n += 1
            return x + self.n

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.counter = Counter()
            self.table = torch.nn.Embedding.from_pretrained(torch.zeros(5, 1))
            self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

        def forward(self, x, index):
            self.calls += 1
            return self.counter(x) + self.calls + self.table(index)

    def make(out):
        args = torch.zeros(1), torch.tensor(1)
        doubleweave.compile(Counting(), args, policy={"counter": Dynamic()}, out=out)

    return made_once("counting", make)


@pytest.fixture
def counting(counting_path):
    return doubleweave.open(counting_path)


ZERO, INDEX = np.zeros(1, "f4"), np.array(3)


def counts(states):
    return states["calls"].item(), states["counter.n"].item()


def test_no_update_of_a_state_is_lost(counting):
    found = []

    def call():
        for _ in range(50):
            found.append(counting(ZERO, INDEX).item())

    together(*[call] * 4)
    assert counts(counting.state) == (200, 200)
    # Each call saw the state as exactly one other left it.
    assert sorted(found) == [2 * number for number in range(1, 201)]


def test_whole_and_single_calls_from_threads_wait_for_no_circle(counting):
    whole, single = [], []

    def call_whole():
        for _ in range(40):
            whole.append(counting(ZERO, INDEX))

    def call_single():
        for _ in range(40):
            single.append(counting.methods["counter"](ZERO).item())

    def submit_both():
        futures = [
            (counting.submit(ZERO, INDEX), counting.methods["counter"].submit(ZERO)) for _ in range(40)
        ]
        for one, other in futures:
            whole.append(one.result(TIMEOUT))
            single.append(other.result(TIMEOUT).item())

    together(call_whole, call_single, submit_both, call_whole, call_single)
    assert (len(whole), len(single)) == (120, 120)
    assert counts(counting.state) == (120, 240)
    assert len(set(single)) == len(single)  # no two saw the same state


def test_sessions_are_independent(counting):
    first, second = counting.session(), counting.session()
    together(
        lambda: [first(ZERO, INDEX) for _ in range(30)],
        lambda: [second(ZERO, INDEX) for _ in range(20)],
        lambda: [second.methods["counter"](ZERO) for _ in range(10)],
        lambda: [counting(ZERO, INDEX) for _ in range(5)],
    )
    assert counts(first.state) == (30, 30)
    assert counts(second.state) == (20, 30)
    assert counts(counting.state) == (5, 5)
    first.reset()
    assert (counts(first.state), counts(second.state)) == ((0, 0), (20, 30))
    assert first(ZERO, INDEX).item() == 2


def test_a_failed_call_leaves_the_state_as_it_was(counting):
    counting(ZERO, INDEX)
    counting.methods["counter"](ZERO)
    before = counts(counting.state)
    for _ in range(3):
        with pytest.raises(DoubleweaveError):
            counting(ZERO, np.array(5))  # beyond the table
    assert counts(counting.state) == before == (1, 2)
    assert counting(ZERO, INDEX).item() == 5


def test_sessions_methods_and_results_outlive_the_program(counting_path):
    program = doubleweave.open(counting_path)
    session, method, found = program.session(), program.methods["counter"], program(ZERO, INDEX)
    del program
    gc.collect()
    assert found.item() == 2
    assert method(ZERO).item() == 2
    assert session(ZERO, INDEX).item() == 2
    assert method.submit(ZERO).result(TIMEOUT).item() == 3


def test_a_module_may_be_named_as_the_class_around_it():
    import torch

    class Double(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.Net = Double()

        def forward(self, x):
            return self.Net(x) + 1

    program = doubleweave.compile(Net(), (torch.ones(3),), policy={"Net": Dynamic()})
    one = np.ones(3, "f4")
    assert program(one).tolist() == [3, 3, 3]
    assert program.methods["Net"](one).tolist() == [2, 2, 2]


def test_a_state_may_be_returned_as_it_was():
    import torch

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x):
            before = self.last
            self.last = x + 0
            return before

    program = doubleweave.compile(Last(), (torch.ones(2),))
    found = [program(np.full(2, number, "f4")).tolist() for number in (1, 2, 3)]
    assert found == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("kind", ["returned", "swapped"])
def test_a_state_changed_chunk_by_chunk_is_seen_as_a_whole(kind):
    import torch
    from torch.export import Dim

    class Sums(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(2))
            self.register_buffer("b", torch.zeros(2))

        def forward(self, x):
            if kind == "swapped":
                self.a, self.b = self.b, self.a + x.sum(0)
                return 2 * x
            self.a += x.sum(0)
            return 2 * x, self.a

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sums = Sums()

        def forward(self, x):
            return self.sums(x)

    rows = Dim("rows", min=1, max=16)
    policy = {"sums": Static(chunk={"x": 0}, sizes=(1, 4))}
    try:
        program = doubleweave.compile(
            Net(), (torch.ones(4, 2),), dynamic_shapes={"x": {0: rows}}, policy=policy
        )
    except SplitError:
        return  # better refused than wrong
    a, b = np.zeros(2), np.zeros(2)
    for count in (4, 8, 5):
        x = np.full((count, 2), count, "f4")
        found = program(x)
        total = x.sum(0)
        a, b = (b, a + total) if kind == "swapped" else (a + total, b)
        assert kind == "swapped" or found[1].tolist() == a.tolist()
        assert program.state["sums.a"].tolist() == a.tolist()


def test_states_are_a_mapping(counting):
    counting.state["calls"] = (3,) if counting.state["calls"].ndim else 3
    assert counting.state.get("calls").item() == 3
    assert counting.state.get("none") is None
    assert counting.state.get("none", 7) == 7
    with pytest.raises(InputError, match="state 'calls': found a NoneType, expected"):
        counting.state["calls"] = None
    counting.state.reset()
