"""Module trees split by a policy and compiled, each against eager torch: shared, nested, called in many forms."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import doubleweave as dw
from doubleweave import _native
from doubleweave.ir.manifest import PROGRAM_FILE
from module_trees import Around, Basic, Both, MatMul, rows


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)


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


@pytest.mark.parametrize(
    "function",
    [lambda x: x.topk(2), lambda x: x.max(-1), lambda x: {"least": [x.min(0)]}],
)
def test_results_with_names_of_torch(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    program, x = dw.compile(Model(), (rows(3, 6),)), rows(3, 6)
    found, wanted = program(x), Model()(x)
    assert type(found) is type(wanted)
    if isinstance(found, dict):
        found, wanted = found["least"][0], wanted["least"][0]
    assert torch.equal(found.values, wanted.values)
    assert torch.equal(found[1], wanted.indices)
    assert type(dw.open(program.folder)(x.numpy())) is type(Model()(x))
