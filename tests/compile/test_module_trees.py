"""Module trees of many kinds, split by a policy and compiled, each against eager torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

import doubleweave as dw
from doubleweave import _native
from doubleweave.ir.manifest import PROGRAM_FILE


class MatMul(nn.Module):
    def forward(self, a, b):
        return a @ b


class Basic(nn.Module):
    def __init__(self):
        super().__init__()
        self.MatMul = MatMul()

    def forward(self, x, y):
        out1 = self.MatMul(x, y)  # 3x6 @ 6x3 -> 3x3
        out2 = self.MatMul(out1, x)  # 3x3 @ 3x6 -> 3x6
        return out2


class Branch(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.shared = shared
        self.own = nn.Linear(4, 4)

    def forward(self, x):
        return self.own(torch.relu(self.shared(x)))


class TwoParents(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.left, self.right = Branch(shared), Branch(shared)

    def forward(self, x):
        return self.left(x) - self.right(x + 1)


class Around(nn.Module):
    """Something before and after a nested module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(self.inner(x * 2) - 1)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Stats:
    mean: Tensor
    label: str
    rest: tuple[Tensor | None, ...]


class Returns(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        a, b = x * self.scale, x - self.scale
        return {
            "tuple": lambda: (a, b),
            "list": lambda: [a, b],
            "dict": lambda: {"a": a, "nested": [b, (None, 3, "text")]},
            "named_tuple": lambda: Pair(a, b),
            "dataclass": lambda: Stats(a, "ab", (b, None)),
            "twice": lambda: (a, a),
            "input_too": lambda: (x, a),
        }[self.form]()


FORMS = ("tuple", "list", "dict", "named_tuple", "dataclass", "twice", "input_too")


class AllForms(nn.Module):
    def __init__(self):
        super().__init__()
        self.forms = nn.ModuleDict({form: Returns(form) for form in FORMS})

    def forward(self, x):
        return {form: module(x) for form, module in self.forms.items()}


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, flip=False, n=1, mode="plain", bias=None, *, scale=1.0):
        y = self.fc(x) * n * scale
        y = -y if flip else y
        y = torch.relu(y) if mode == "relu" else y
        return y if bias is None else y + bias


class CallsModes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = Modes()

    def forward(self, x, y):
        first = self.fc(x) + self.fc(x, True, 2) + self.fc(y)
        return first + self.fc(y, mode="relu", scale=0.5) + self.fc(x, bias=y) + self.fc(y, n=2, flip=True)


class Containers(nn.Module):
    def forward(self, xs, named, *rest, extra=None, **others):
        total = xs[0] + xs[1][0] * named["a"] + named["b"]["c"] + sum(rest)
        return total + others["w"] if extra is None else total * extra + others["w"]


class CallsContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Containers()

    def forward(self, xs, named):
        x = xs[0]
        first = self.inner([x, (xs[1],)], named, x, x * 3, extra=x, w=x * 4)
        return self.inner([first, (x,)], {"b": named["b"], "a": x}, w=x)


class TwoCut(nn.Module):
    """Two arguments with rows on different axes, and one without."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, a, b, w):
        return {"sum": self.fc(a) * b.t() + w, "wide": (a - w).unsqueeze(1)}


class Attention(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention = Attention()
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, rows, width = x.shape
        q, k, v = (
            part.view(batch, rows, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = self.attention(q, k, v).transpose(1, 2).reshape(batch, rows, width)
        return x + self.out(attended)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.count.add_(1)
        return x * self.count


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


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids, mask, x):
        found = torch.where(mask[..., None], self.embedding(ids).double(), x.softmax(-1))
        return found, ids * 2 + 1, mask.logical_not()


class Longer(nn.Module):
    """Its first argument has twice as many rows as its second."""

    def forward(self, a, b):
        return a[: b.shape[0]] + b


class CallsLonger(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Longer()

    def forward(self, x):
        return self.inner(torch.cat((x, x)), x)


class Halves(nn.Module):
    """Adds the halves of its first argument: that it has twice as many rows matters."""

    def forward(self, a, b):
        return a.reshape(2, b.shape[0], b.shape[1]).sum(0) + b


class AsIs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        z = self.fc(x)
        return y, x, z, z, (y,)


class ReturnsParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("fixed", torch.randn(2))

    def forward(self, x):
        return x + 1, self.weight, self.fixed


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


def assert_same(got, want):
    """Equal as Python values, tensors within float32's noise."""
    if isinstance(want, Tensor):
        assert type(got) is Tensor  # a parameter that is returned comes as a plain tensor
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)
        return
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert list(got) == list(want)
        assert_same(list(got.values()), list(want.values()))
    elif isinstance(want, (tuple, list)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    elif dataclasses.is_dataclass(want):
        assert_same(vars(got), vars(want))
    else:
        assert got == want


class Both:
    """A compiled program and the same module in eager torch, called together."""

    def __init__(self, module, args, kwargs=None, **options):
        self.module = module
        self.eager = self.fresh()
        self.program = dw.compile(module, args, kwargs, **options)

    def fresh(self):
        """The module with its first states."""
        return copy.deepcopy(self.module)

    def check(self, *args, **kwargs):
        with torch.no_grad():
            want = self.eager(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        assert_same(self.program(*args, **kwargs), want)

    def check_method(self, name, *args, **kwargs):
        with torch.no_grad():
            want = self.eager.get_submodule(name.partition("#")[0])(*args, **kwargs)
        assert_same(self.program.methods[name](*args, **kwargs), want)

    def check_states(self):
        for name, value in self.program.state.items():
            torch.testing.assert_close(torch.from_numpy(value), self.eager.get_buffer(name))

    def devices(self):
        return {segment.name: segment.device for segment in self.program.split.segments}


def rows(*sizes):
    return torch.randn(*sizes)


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


# The example that started it.


@pytest.fixture(scope="module")
def basic():
    m, k, n = Dim("m", min=1, max=10), Dim("k", min=1, max=10), Dim("n", min=1, max=10)
    return Both(
        Basic(),
        (torch.randn(3, 6), torch.randn(6, 3)),
        policy={"MatMul": dw.Dynamic({"a": {0: m, 1: k}, "b": {0: k, 1: n}}, device="cpu")},
    )


def test_one_matmul_serves_both_calls_and_any_other(basic):
    x, y = torch.randn(3, 6), torch.randn(6, 3)
    basic.check(x, y)
    program = basic.program
    assert [call.segment for call in program.split.main.calls] == ["MatMul", "MatMul"]
    assert [segment.name for segment in program.split.segments] == list(program.methods) == ["MatMul"]
    assert _native.Program(str(program.folder / PROGRAM_FILE)).method_names == ["MatMul"]
    basic.check_method("MatMul", torch.randn(7, 2), torch.randn(2, 9))
    basic.check_method("MatMul", torch.randn(1, 10), b=torch.randn(10, 1))
    assert repr(program.methods["MatMul"]) == (
        "<method MatMul(a: float32[m, k], b: float32[k, n]) -> float32[m, n], m in 1..10, k in 1..10, n in 1..10>"
    )


def test_matmul_from_numpy(basic):
    a, b = (np.random.default_rng(0).standard_normal(size).astype("f4") for size in ((7, 2), (2, 9)))
    np.testing.assert_allclose(basic.program.methods["MatMul"](a, b), a @ b, rtol=1e-5, atol=1e-6)


def test_one_dim_for_four_axes_is_refused_with_dims_that_work():
    size = Dim("size", min=1, max=10)
    rule = dw.Dynamic({"a": {0: size, 1: size}, "b": {0: size, 1: size}})
    with pytest.raises(dw.PolicyError) as refused:
        dw.compile(Basic(), (torch.randn(3, 6), torch.randn(6, 3)), policy={"MatMul": rule})
    message = str(refused.value)
    assert "'size' stands for axis 0 of a, which is 3, and for axis 1 of a, which is 6" in message
    assert 'dims that would work: {"a": {0: m, 1: k}, "b": {0: k, 1: n}}' in message


def test_dims_that_were_proposed_work(basic):
    """Those of the refusal above are the fixture's."""
    ranges = basic.program.split.function("MatMul").ranges
    assert [tuple(r) for r in ranges] == [("m", 1, 10), ("k", 1, 10), ("n", 1, 10)]


def test_matmul_as_two_fixed_sizes():
    both = Both(Basic(), (rows(3, 6), rows(6, 3)), policy={MatMul: dw.Static()})
    both.check(rows(3, 6), rows(6, 3))
    assert list(both.program.methods) == ["MatMul", "MatMul#1"]
    both.check_method("MatMul#1", rows(3, 3), rows(3, 6))


# Trees of modules.


def test_shared_by_two_parents_is_one_function():
    both = Both(
        TwoParents(),
        (rows(3, 4),),
        dynamic_shapes={"x": {0: Dim("T", min=1, max=64)}},
        policy={"right.shared": dw.Dynamic(), "left": dw.Dynamic(device="npu")},
    )
    for n in (1, 3, 64):
        both.check(rows(n, 4))
    # It goes by its first name, also inside the parent that the policy names.
    assert [segment.name for segment in both.program.split.segments if segment.name.endswith("shared")] == [
        "left.shared"
    ]
    both.check_method("left", rows(5, 4))
    both.check_method("left.shared", rows(5, 4))


@pytest.fixture(scope="module")
def nested():
    return Both(
        Around(Around(Around(nn.Linear(4, 4)))),
        (rows(3, 4),),
        dynamic_shapes={"x": {0: Dim("T", min=1, max=64)}},
        policy={
            "inner": dw.Dynamic(device="gpu"),
            "inner.inner": dw.Static(chunk={"x": 0}, sizes=(4,)),
            "re:inner(.inner)+.inner": dw.Dynamic(device="dsp"),
        },
    )


def test_nested_in_one_another(nested):
    for n in (1, 3, 4, 9, 64):
        nested.check(rows(n, 4))
        for name in ("inner", "inner.inner", "inner.inner.inner"):
            nested.check_method(name, rows(n, 4))


def test_neighbours_on_different_devices_do_not_merge():
    """Each would be one segment with the next if the devices were the same."""
    policy = {"0": dw.Dynamic(), "1": dw.Dynamic(device="npu"), "2": dw.Static(device="gpu")}
    both = Both(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), (rows(3, 4),), policy=policy
    )
    both.check(rows(3, 4))
    assert both.devices() == {"0": "cpu", "1": "npu", "2": "gpu", "glue_0": "cpu"}
    assert [both.program.methods[name].device for name in "012"] == ["cpu", "npu", "gpu"]


@pytest.fixture(scope="module")
def all_forms():
    policy = {Returns: dw.Dynamic({"x": {0: Dim("n", min=1, max=9)}})}
    return Both(AllForms(), (rows(3, 4),), policy=policy)


def test_what_is_returned_keeps_its_form(all_forms):
    all_forms.check(rows(3, 4))


@pytest.mark.parametrize("form", FORMS)
def test_form_of_one_module(all_forms, form):
    all_forms.check_method(f"forms.{form}", rows(7, 4))


def test_flags_numbers_and_modes_are_variants():
    both = Both(CallsModes(), (rows(3, 4), rows(3, 4)), policy={"fc": dw.Dynamic()})
    both.check(rows(3, 4), rows(3, 4))
    assert list(both.program.methods) == ["fc", "fc#1", "fc#2", "fc#3", "glue_0"]
    x, y = rows(3, 4), rows(3, 4)
    both.check_method("fc", x)
    both.check_method("fc", x, False, mode="plain")
    both.check_method("fc#1", x, True, n=2)
    both.check_method("fc#2", x, mode="relu", scale=0.5)
    both.check_method("fc#3", x, bias=y)
    with pytest.raises(
        dw.InputError, match=r"fc, flip: found True, expected False \(constants are compiled in\)"
    ):
        both.program.methods["fc"](x, True)


def test_nested_lists_dicts_and_keywords():
    def arguments(n):
        return [rows(n, 4), rows(n, 4)], {"a": rows(n, 4), "b": {"c": rows(n, 4)}}

    axes = {0: Dim("n", min=1, max=9)}
    both = Both(
        CallsContainers(),
        arguments(3),
        dynamic_shapes={"xs": [axes, axes], "named": {"a": axes, "b": {"c": axes}}},
        policy={"inner": dw.Dynamic()},
    )
    for n in (1, 3, 9):
        both.check(*arguments(n))
    xs, named = arguments(4)
    both.check(xs, {"b": named["b"], "a": named["a"]})  # the order of keys does not matter
    both.check_method("inner", [xs[0], (xs[1],)], named, xs[0], xs[1], extra=xs[0], w=xs[1])
    both.check_method("inner#1", [xs[0], (xs[1],)], named, w=xs[1])
    assert list(both.program.split.main.interface.input_names) == [
        "xs[0]",
        "xs[1]",
        "named['a']",
        "named['b']['c']",
    ]


# Chunks.

T = Dim("T", min=1, max=300)
LENGTHS = (1, 3, 4, 5, 15, 16, 17, 299, 300)  # below, at, above and far above the sizes
SIZES = (4, 16)


@pytest.mark.parametrize(
    ("shape", "axis", "copies"), [((3, 4), 0, 0), ((1, 3, 4), 1, 0), ((3, 5, 4), 1, 3)], ids=str
)
def test_chunks_along_an_axis(shape, axis, copies):
    """With several batches the rows of a chunk do not lie one behind the other: they are copied together."""

    def arguments(n):
        return rows(*shape[:axis], n, *shape[axis + 1 :])

    both = Both(
        nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))),
        (arguments(5),),
        dynamic_shapes={"input": {axis: T}},
        policy={"0": dw.Static(chunk={"input": axis}, sizes=SIZES)},
    )
    for n in LENGTHS:
        both.check(arguments(n))
        both.check_method("0", arguments(n))
    assert list(both.program.methods) == ["0", "0@16", "0@4"]
    x = arguments(4)
    assert_same(both.program.methods["0@4"](x), both.program.methods["0"](x))
    both.program.record = True
    both.check(arguments(32))
    events = both.program.timeline.events
    assert {event.chunk for event in events} == {0, 1}
    assert sum(event.call.endswith("(copy)") for event in events) == (4 if copies else 0)


def test_chunks_of_several_arguments():
    def arguments(n):
        return rows(n, 4), rows(4, n), rows(4)

    both = Both(
        TwoCut(),
        arguments(3),
        dynamic_shapes={"a": {0: T}, "b": {1: T}, "w": None},
        policy={"": dw.Static(chunk={"a": 0, "b": 1}, sizes=SIZES)},
    )
    for n in LENGTHS:
        both.check(*arguments(n))
    with pytest.raises(dw.InputError, match="where T = 3 from what came before"):
        both.program(rows(3, 4), rows(4, 5), rows(4))


def test_whole_module_in_chunks():
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 4))
    both = Both(
        module,
        (rows(3, 4),),
        dynamic_shapes=({0: T},),
        policy={"": dw.Static(chunk={"input": 0}, sizes=SIZES)},
    )
    for n in LENGTHS:
        both.check(rows(n, 4))
    (segment,) = both.program.split.segments
    assert (segment.device, segment.shape.sizes) == ("npu", SIZES)
    assert segment.rows == "shown from the graph, and checked in numbers"


def transformer(rule):
    return Both(
        nn.Sequential(Block(), Block()),
        (rows(1, 6, 8),),
        dynamic_shapes={"input": {1: Dim("T", min=1, max=64)}},
        policy={Block: dw.Static(chunk={"x": 1}, sizes=SIZES), Attention: rule},
    )


def test_static_blocks_around_dynamic_attention():
    n = Dim("n", min=1, max=64)
    both = transformer(dw.Dynamic({"q": {2: n}, "k": {2: n}, "v": {2: n}}))
    for length in (1, 4, 6, 17, 64):
        both.check(rows(1, length, 8))
    both.check_method("1", rows(1, 21, 8))
    both.check_method("0.attention", *(rows(1, 2, 9, 4) for _ in range(3)))
    devices = both.devices()
    assert [devices[name] for name in ("0.glue_0", "0.attention", "0.glue_1")] == ["npu", "cpu", "npu"]
    structures = {segment.name: segment.structure for segment in both.program.split.segments}
    assert structures["0.glue_1"] == structures["1.glue_1"]  # lowered once


def test_dynamic_attention_whose_dims_follow_from_its_calls():
    both = transformer(dw.Dynamic())
    both.check(rows(1, 17, 8))


# State.


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


# Programs on disk.

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


# Dims.


def test_dims_follow_from_the_calls():
    """An axis is dynamic where the calls of a module differ, or vary themselves."""
    both = Both(
        Basic(),
        (rows(3, 6), rows(6, 3)),
        dynamic_shapes={"x": None, "y": None},
        policy={"MatMul": dw.Dynamic()},
    )
    both.check(rows(3, 6), rows(6, 3))
    (segment,) = both.program.split.segments
    assert [tuple(r)[1:] for r in segment.shape.ranges] == [(3, 6), (3, 6)]
    both.check_method("MatMul", rows(3, 4), rows(4, 5))
    with pytest.raises(dw.InputError, match=r"found shape \[4, 4\], expected \[3, "):
        both.program.methods["MatMul"](rows(4, 4), rows(4, 5))


def test_nested_dims_keep_their_own_range():
    """The whole module is narrower than the module that it calls."""
    both = Both(
        Around(nn.Linear(4, 4)),
        (rows(3, 4),),
        dynamic_shapes=({0: Dim("T", min=2, max=8)},),
        policy={"inner": dw.Dynamic(({0: Dim("wide", min=1, max=100)},))},  # by position
    )
    for n in (2, 8):
        both.check(rows(n, 4))
    for n in (1, 100):
        both.check_method("inner", rows(n, 4))
        with pytest.raises(dw.InputError, match=rf"with T in 2\.\.8: T is {n}"):
            both.program(rows(n, 4))
    ranges = {f.name: [tuple(r) for r in f.ranges] for f in both.program.split.functions}
    assert ranges == {"": [("T", 2, 8)], "inner": [("wide", 1, 100)]}


def test_dims_of_the_whole_module_in_the_policy():
    n = Dim("n", min=1, max=9)
    both = Both(nn.Linear(4, 4), (rows(3, 4),), policy={"": dw.Dynamic({"input": {0: n}}, device="gpu")})
    for size in (1, 9):
        both.check(rows(size, 4))
    assert both.devices() == {"glue_0": "gpu"}


def test_derived_dims():
    k = Dim("k", min=1, max=9)
    both = Both(Longer(), (rows(4, 3), rows(2, 3)), dynamic_shapes={"a": {0: 2 * k}, "b": {0: k}})
    for n in (1, 2, 9):
        both.check(rows(2 * n, 3), rows(n, 3))
    with pytest.raises(dw.InputError, match=r"a: found shape \[4, 3\], expected \[2\*k, 3\].*where k = 3"):
        both.program(rows(4, 3), rows(3, 3))


def test_derived_dims_that_matter():
    k = Dim("k", min=1, max=9)
    both = Both(Halves(), (rows(4, 3), rows(2, 3)), dynamic_shapes={"a": {0: 2 * k}, "b": {0: k}})
    for n in (1, 2, 9):
        both.check(rows(2 * n, 3), rows(n, 3))


def test_derived_dims_of_a_nested_module():
    k = Dim("k", min=1, max=9)
    both = Both(
        CallsLonger(),
        (rows(3, 4),),
        dynamic_shapes={"x": {0: Dim("n", min=1, max=5)}},
        policy={"inner": dw.Dynamic({"a": {0: 2 * k}, "b": {0: k}})},
    )
    for n in (1, 3, 5):
        both.check(rows(n, 4))
    both.check_method("inner", rows(18, 4), rows(9, 4))


def test_derived_dim_alone():
    k = Dim("k", min=1, max=9)
    both = Both(nn.ReLU(), (rows(6, 3),), dynamic_shapes={"input": {0: 2 * k}})
    for n in (18, 4, 2):
        both.check(rows(n, 3))


# What goes in and out as it is; kinds of tensors.


def test_inputs_and_results_returned_several_times():
    both = Both(AsIs(), (rows(3, 4), rows(2)))
    x, y = rows(3, 4), rows(2)
    both.check(x, y)
    got = both.program(x, y)
    assert got[2] is got[3]
    assert got[0].data_ptr() != y.data_ptr()  # results are the caller's own


@pytest.mark.parametrize("module", [nn.Identity(), Around(nn.Identity())], ids=["whole", "nested"])
def test_module_that_computes_nothing(module):
    both = Both(module, (rows(3, 4),), policy={nn.Identity: dw.Dynamic()})
    both.check(rows(3, 4))


def test_parameter_returned():
    both = Both(ReturnsParameter(), (rows(3, 4),))
    both.check(rows(3, 4))


def test_integers_bools_and_float64():
    batch = Dim("batch", min=1, max=5)
    both = Both(
        Masked(),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]]), rows(1, 3, 4).double()),
        dynamic_shapes={"ids": {0: batch}, "mask": {0: batch}, "x": {0: batch}},
        policy={"embedding": dw.Static(chunk={"input": 0}, sizes=(2,))},
    )
    for n in (1, 2, 5):
        both.check(torch.randint(0, 10, (n, 3)), torch.rand(n, 3) > 0.5, rows(n, 3, 4).double())
    dtypes = [value.dtype for value in both.program.split.main.inputs]
    assert dtypes == ["int64", "bool", "float64"]


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, n, offset=0.5):
        return self.weight * n + offset


def test_without_tensor_arguments():
    both = Both(Table(), (3,))
    with torch.no_grad():
        want = both.eager(3)
    got = both.program(3)  # nothing says that the caller wants torch's tensors
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x):
        out, (h, c) = self.lstm(x)
        return {"out": out, "state": (h, c)}


def test_recurrent_in_eval_mode():
    both = Both(Recurrent().eval(), (rows(1, 2, 4),), policy={"lstm": dw.Dynamic()})
    both.check(rows(1, 2, 4))


def test_convolutions():
    length, batch = Dim("length", min=4, max=32), Dim("batch", min=1, max=9)
    one = Both(
        nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.ReLU()),
        (rows(2, 3, 8),),
        dynamic_shapes={"input": {2: length}},
    )
    two = Both(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2)).eval(),
        (rows(2, 3, 8, 8),),
        dynamic_shapes={"input": {0: batch}},
        policy={"": dw.Static(chunk={"input": 0}, sizes=(1, 4))},
    )
    for n in (4, 9, 32):
        one.check(rows(2, 3, n))
    for n in (1, 4, 6, 9):
        two.check(rows(n, 3, 8, 8))


def test_without_a_policy_all_is_one_segment():
    module = nn.Sequential(nn.Linear(4, 4), Counter(), nn.Softmax(-1))
    before = copy.deepcopy(module.state_dict())
    both = Both(module, (rows(3, 4),))
    for _ in range(3):
        both.check(rows(3, 4))
    assert list(both.program.methods) == ["glue_0"]
    # The module itself is as it was.
    assert_same(dict(module.state_dict()), dict(before))
    assert not any("forward" in vars(found) for found in module.modules())
