"""Modules with state, in memory and on disk, each against eager torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import doubleweave as dw
from module_trees import SIZES, Around, Both, Counter, assert_same, rows


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


class RunningMean(nn.Module):
    """Its state changes twice in one run."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        self.mean.mul_(0.5)
        self.mean.add_(0.5 * x.mean(0))
        return x - self.mean


class Stateful(nn.Module):
    """States of its own and of nested modules, one of which is called twice."""

    def __init__(self):
        super().__init__()
        self.counter = Counter()
        self.mean = RunningMean()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen.add_(x.shape[0])
        return self.mean(self.counter(self.mean(x))) + self.seen


class CumulativeSum(nn.Module):
    """Causal, from run to run: in order, its rows may come in chunks, but none may be padding."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("rows", torch.tensor(0))

    def forward(self, x):
        result = self.total + x.cumsum(0)
        self.total.copy_(result[-1])
        self.rows.add_(x.shape[0])
        return result * 0.1


class PaddedThenState(nn.Module):
    """Rows that a padded chunk computes pass through two modules with state."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.cumsum = CumulativeSum()
        self.mean = RunningMean()

    def forward(self, x):
        return self.mean(self.cumsum(self.cumsum(self.fc(x))))


class ReturnsState(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x.sum(0))
        return self.total


class Reassigns(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total = self.total + x.sum(0)
        return x + self.total


@pytest.fixture(scope="module")
def stateful():
    policy = {"counter": dw.Dynamic(device="npu"), "mean": dw.Dynamic()}
    return Both(Stateful(), (rows(3, 4),), dynamic_shapes={"x": {0: Dim("T", min=1, max=64)}}, policy=policy)


def test_states_go_on_from_run_to_run(stateful):
    for n in (3, 1, 64):
        stateful.check(rows(n, 4))
        stateful.check_states()
    assert list(stateful.program.state) == ["seen", "counter.count", "mean.mean"]


def test_a_method_changes_the_state_of_its_session(stateful):
    x = rows(5, 4)
    stateful.check_method("mean", x)
    stateful.check_method("counter", x)
    stateful.check_states()


def test_states_by_name(stateful):
    session = stateful.program.session()
    first = {name: value.copy() for name, value in session.state.items()}
    np.testing.assert_array_equal(first["mean.mean"], np.ones(4))
    x = rows(3, 4)
    once = session(x)
    assert session.state["counter.count"] == 1
    assert session.state["seen"] == 3
    session.state["mean.mean"] = np.ones(4, "f4")
    session.state["seen"] = torch.tensor(0)
    session.state.reset("counter.count")
    assert_same(session(x), once)
    copied = session.state["mean.mean"]
    copied[:] = 7  # a copy: the session's own stays
    assert not np.array_equal(session.state["mean.mean"], copied)
    session.reset()
    for name, value in session.state.items():
        np.testing.assert_array_equal(value, first[name])
    assert_same(session(x), once)


def test_sessions_are_independent(stateful):
    one, other = stateful.program.session(), stateful.program.session()
    x = rows(3, 4)
    before = {name: value.copy() for name, value in stateful.program.state.items()}
    first = one(x)
    assert not torch.equal(one(x), first)
    assert_same(other(x), first)
    assert (one.state["counter.count"], other.state["counter.count"]) == (2, 1)
    for name, value in stateful.program.state.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    return Both(
        PaddedThenState(),
        (rows(3, 4),),
        dynamic_shapes={"x": {0: Dim("T", min=1, max=64)}},
        policy={
            "fc": dw.Static(chunk={"input": 0}, sizes=SIZES),
            CumulativeSum: dw.Static(device="dsp", chunk={"x": 0}, sizes=(1, 4, 16)),
            "mean": dw.Dynamic(),
        },
        out=tmp_path_factory.mktemp("module") / "program",
    )


def test_padding_never_reaches_a_state(padded):
    """The padded rows of fc are not zero: it has a bias."""
    for n in (1, 3, 4, 5, 21, 64):
        padded.check(rows(n, 4))
        padded.check_states()
        padded.check_method("cumsum", rows(n, 4))
        padded.check_states()


def test_golden_split(padded, golden):
    golden("module_split.txt", str(padded.program.split))


def test_chunks_with_state_add_up_exactly(padded):
    program = padded.program
    program.record = True
    padded.check(rows(22, 4))
    chunks = [event for event in program.timeline.events if event.segment == "cumsum"]
    program.record = False
    assert len(chunks) == 2 * len((16, 4, 1, 1))
    assert not any("(copy)" in event.call for event in chunks)


def test_state_returned_as_it_is():
    both = Both(ReturnsState(), (rows(3, 4),))
    for _ in range(2):
        both.check(rows(3, 4))
        both.check_states()


def test_state_assigned_anew():
    both = Both(Reassigns(), (rows(3, 4),))
    for _ in range(2):
        both.check(rows(3, 4))
        both.check_states()


class CopiesTwice(nn.Module):
    """Two states take the same value."""

    def __init__(self):
        super().__init__()
        self.register_buffer("one", torch.zeros(3, 4))
        self.register_buffer("other", torch.zeros(3, 4))

    def forward(self, x):
        result = x + self.one - self.other
        doubled = x * 2
        self.one.copy_(doubled)
        self.other.copy_(doubled)
        return result


def test_two_states_with_one_value():
    both = Both(CopiesTwice(), (rows(3, 4),))
    for _ in range(2):
        both.check(rows(3, 4))
        both.check_states()


class TwoNames(nn.Module):
    """One module, and so one state, under two names."""

    def __init__(self):
        super().__init__()
        self.first = Around(Counter())
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("policy", [{}, {"first": dw.Dynamic()}, {"second": dw.Dynamic()}], ids=str)
def test_a_state_under_two_names_is_one(policy):
    both = Both(TwoNames(), (rows(3, 4),), policy=policy)
    for _ in range(2):
        both.check(rows(3, 4))
    assert {name: int(value) for name, value in both.program.state.items()} == {"first.inner.count": 4}


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        out = x - 0.1 * self.total
        self.total.add_(x.sum(0))
        return out


class Inner(nn.Module):
    def __init__(self, sum):
        super().__init__()
        self.sum = sum

    def forward(self, x):
        self.sum(x)
        return x * 2


class CallsInTurn(nn.Module):
    """Results that nobody reads; each call changes the state."""

    def __init__(self):
        super().__init__()
        self.sum = Sum()
        self.inner = Inner(self.sum)

    def forward(self, x):
        self.sum(self.sum(x))
        return self.sum(self.inner(x))


@pytest.mark.parametrize("keys", [[], ["sum"], ["sum", "inner"]], ids=str)
def test_calls_that_change_a_state_run_in_turn(keys):
    both = Both(CallsInTurn(), (rows(3, 4),), policy=dict.fromkeys(keys, dw.Dynamic()))
    for _ in range(2):
        both.check(rows(3, 4))
        both.check_states()


def test_equal_modules_with_ranges_of_their_own():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.GELU(), nn.GELU()

        def forward(self, x):
            return torch.cat((self.a(x), self.b(torch.cat((x, x)))))

    dims = {"x": {0: Dim("T", min=1, max=3)}}
    both = Both(Doubles(), (rows(3, 4),), dynamic_shapes=dims, policy={nn.GELU: dw.Dynamic()})
    for n in (1, 3):
        both.check(rows(n, 4))


def test_an_odd_number_of_integers_that_are_constants():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 4)

        def forward(self, x):
            return x + self.embedding(torch.arange(x.shape[0]) % 4)

    Both(Positions(), (rows(11, 4),), policy={"embedding": dw.Dynamic()}).check(rows(11, 4))


class Notes(nn.Module):
    """Leaves things in attributes that it never reads again."""

    def __init__(self):
        super().__init__()
        self.length = None
        self.sizes = (3, 4)
        self.config = {"limit": float("nan"), "names": ["a"]}

    def forward(self, x):
        self.length = x.shape[-1]
        self.sizes = tuple(x.shape[1:])
        self.scores = x.softmax(-1)
        return self.scores * self.length


def test_what_forward_only_notes_is_no_state():
    module = Notes()
    module.sizes = (4,)
    before = dict(vars(module))
    both = Both(module, (rows(3, 4),), dynamic_shapes={"x": {0: Dim("T", min=1, max=8)}})
    both.check(rows(5, 4))
    assert vars(module) == before
    assert "scores" not in vars(module)


RUN = """
import json, sys
import numpy as np
import doubleweave
folder, data = sys.argv[1:]
given = np.load(data)
program = doubleweave.open(folder)
results = {f"whole {name}": program(given[name]) for name in given}
results |= {f"mean {name}": program.methods["mean"](given[name]) for name in given}
np.savez(data, **results, **program.state)
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_program_in_a_folder_runs_without_torch(padded, tmp_path):
    given = {str(n): rows(n, 4) for n in (3, 21)}
    folder, data = padded.program.folder, tmp_path / "data.npz"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "program.pte", "state.bin"]
    np.savez(data, **{name: x.numpy() for name, x in given.items()})
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), str(data)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "executorch"} & set(json.loads(done.stdout.splitlines()[-1]))
    found = np.load(data)
    eager = padded.fresh()
    with torch.no_grad():
        wanted = {f"whole {name}": eager(x) for name, x in given.items()}
        wanted |= {f"mean {name}": eager.mean(x) for name, x in given.items()}
    wanted |= dict(eager.named_buffers())
    assert sorted(found) == sorted(wanted)
    for name, want in wanted.items():
        np.testing.assert_allclose(found[name], want.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    # What the other process ran changed nothing on disk.
    assert_same(dw.open(folder)(given["3"]), padded.program.session()(given["3"]))
