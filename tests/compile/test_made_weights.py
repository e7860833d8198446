"""Weights that are made when somebody asks for them, and kept only while they are few."""

from __future__ import annotations

import pytest
import torch

from doubleweave.compiler.split import weights
from doubleweave.compiler.split.weights import JoinedWeights, MadeWeights


class Counted:
    """A conversion that says how often it ran."""

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def __call__(self, tensors):
        self.calls += 1
        return tuple(tensor * self.factor for tensor in tensors)


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes are kept."""
    return lambda size: monkeypatch.setattr(weights, "_KEPT_BYTES", size)


def is_kept(made, name):
    return made[name][0] is made[name][0]


PLAIN = {name: (torch.full((4,), float(number)),) for number, name in enumerate(("a", "b", "c"), 1)}


def test_nothing_is_made_before_somebody_asks(room):
    room(1 << 20)
    double, triple = Counted(2), Counted(3)
    made = MadeWeights(MadeWeights(PLAIN, {"a": double, "b": double}), {"b": triple})
    assert (list(made), len(made), double.calls) == (["a", "b", "c"], 3, 0)
    assert [made[name][0][0].item() for name in made] == [2, 12, 3]
    assert (double.calls, triple.calls) == (2, 1)


def test_few_are_kept_and_many_are_made_again(room):
    room(40)  # two segments and a half
    double = Counted(2)
    made = MadeWeights(PLAIN, dict.fromkeys(PLAIN, double))
    for _ in range(3):
        assert [made[name][0][0].item() for name in made] == [2, 4, 6]
    assert double.calls == 2 + 3
    assert [is_kept(made, name) for name in made] == [True, True, False]


def test_what_is_made_on_the_way_is_not_kept(room):
    room(1 << 20)
    double, triple = Counted(2), Counted(3)
    inner = MadeWeights(PLAIN, {"a": double})
    outer = MadeWeights(inner, {"a": triple})
    assert is_kept(outer, "a")
    inner["a"]
    assert double.calls == 2  # once for the outer, once for itself
    assert is_kept(outer, "b")  # the source's own


def test_joined(room):
    room(0)
    double = Counted(2)
    joined = JoinedWeights({"": PLAIN, "vision": MadeWeights(PLAIN, {"a": double})})
    assert list(joined) == ["a", "b", "c", "vision.a", "vision.b", "vision.c"]
    assert [joined[name][0][0].item() for name in joined] == [1, 2, 3, 2, 2, 3]
    assert [is_kept(joined, name) for name in ("a", "vision.a", "vision.b")] == [True, False, True]
    outer = MadeWeights(joined, {"vision.a": double})
    assert (outer["vision.a"][0][0].item(), len(outer)) == (4, 6)
