"""Trees of arguments and results: round trips, what fits a tree, and what no tree holds."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubleweave.ir.trees import Tree, TreeError, build, describe, flatten, match


class Pair(NamedTuple):
    left: Any
    right: Any


class Swapped(NamedTuple):
    """The fields of Pair in the other order."""

    right: Any
    left: Any


class Outer:
    class Inner(NamedTuple):
        x: Any


@dataclasses.dataclass
class Config:
    scale: Any
    mask: Any = None
    derived: int = dataclasses.field(init=False, default=7)


@dataclasses.dataclass(frozen=True)
class Frozen:
    items: Any


CONSTANTS = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.none()
)
KEYS = st.one_of(st.text(max_size=5), st.integers())


def containers(inner):
    dicts = st.dictionaries(KEYS, inner, max_size=3)
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        dicts,
        dicts.map(collections.OrderedDict),
        st.builds(Pair, inner, inner),
        st.builds(Outer.Inner, inner),
        st.builds(Config, inner, inner),
        st.builds(Frozen, inner),
    )


VALUES = st.recursive(st.one_of(st.builds(lambda: np.zeros(2)), CONSTANTS), containers, max_leaves=12)


def is_same(a, b):
    """Same classes all the way down, the very same tensors, equal constants."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a is b
    if dataclasses.is_dataclass(a):
        return all(is_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    return a == b


def are(left, right):
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


@given(VALUES)
def test_a_value_is_built_again_from_its_tree_and_tensors(value):
    tree, tensors = flatten(value, "x")
    rest = iter(tensors)
    assert is_same(build(tree, rest), value)
    assert next(rest, None) is None
    assert tree.num_tensors == len(tensors)


@given(VALUES)
def test_a_value_matches_its_own_tree(value):
    tree, tensors = flatten(value, "x")
    assert are(list(match(tree, value, "x")), tensors)


@given(VALUES)
def test_a_tree_is_plain_data(value):
    tree, _ = flatten(value, "x")
    again = Tree.from_dict(json.loads(json.dumps(tree.to_dict())))
    assert again == tree
    assert again.to_dict() == tree.to_dict()


@given(VALUES)
def test_each_path_leads_to_its_tensor(value):
    tree, tensors = flatten(value, "value")
    found = [eval(path, {"value": value}) for path in tree.paths("value")]
    assert are(found, tensors)


@given(VALUES, VALUES)
def test_only_a_value_of_the_same_tree_matches(one, other):
    tree, _ = flatten(one, "x")
    error = None
    try:
        tensors = list(match(tree, other, "x"))
    except TreeError as found:
        error = found
    if error is None:
        assert len(tensors) == tree.num_tensors
        assert describe(build(tree, iter(tensors))) == describe(one)
    else:
        assert error.where.startswith("x")
        assert str(error) == f"{error.where}: found {error.found}, expected {error.expected}"


def test_dicts_are_matched_by_key():
    a, b = np.zeros(1), np.ones(1)
    tree, _ = flatten({"a": a, "b": b}, "x")
    assert are(list(match(tree, {"b": b, "a": a}, "x")), [a, b])


def test_kinds_are_not_mixed():
    x = np.zeros(1)
    for given_, other in [
        ((x, x), [x, x]),
        ([x], (x,)),
        (Pair(x, x), (x, x)),
        ((x, x), Pair(x, x)),
        (Config(x, x), {"scale": x, "mask": x}),
        ({"scale": x, "mask": x}, Config(x, x)),
        (1, 1.0),
        (1, True),
        (0.0, 0),
        ("1", 1),
        (None, 0),
    ]:
        tree, _ = flatten(given_, "x")
        with pytest.raises(TreeError):
            list(match(tree, other, "x"))


X = np.zeros(1)


@pytest.mark.parametrize(
    ("value", "other", "message"),
    [
        (X, 3, "x: found 3, expected a tensor"),
        (X, [X], "x: found a list of 1, expected a tensor"),
        (X, None, "x: found None, expected a tensor"),
        (2, 3, r"x: found 3, expected 2 \(constants are compiled in\)"),
        ("a", "b", r"x: found 'b', expected 'a'"),
        (2, X, r"x: found a tensor, expected 2"),
        ((X, X), (X,), "x: found a tuple of 1, expected a tuple of 2"),
        ([X], [X, X], "x: found a list of 2, expected a list of 1"),
        ([X], X, "x: found a tensor, expected a list of 1"),
        ({"a": X, "b": X}, {"a": X}, "x: found a dict with keys a, expected a dict with keys a, b"),
        ({"a": X}, {}, r"x: found a dict with keys \(none\), expected a dict with keys a"),
        ({}, {"a": X}, r"expected a dict with keys \(none\)"),
        ({"1": X}, {1: X}, "expected a dict with keys 1"),
        (Pair(X, X), X, "x: found a tensor, expected a Pair"),
        (Config(X), {}, r"x: found a dict with keys \(none\), expected a Config"),
        ({"a": [X, (X, 5)]}, {"a": [X, (X, 6)]}, r"x\['a'\]\[1\]\[1\]: found 6, expected 5"),
        (Pair(X, {"k": X}), Pair(X, {"k": 1}), r"x\.right\['k'\]: found 1, expected a tensor"),
        (Config(X, [X]), Config(X, ["s"]), r"x\.mask\[0\]: found 's', expected a tensor"),
    ],
)
def test_what_does_not_match_is_named_with_its_path(value, other, message):
    tree, _ = flatten(value, "x")
    with pytest.raises(TreeError, match=message):
        list(match(tree, other, "x"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1.5: X}, "x: found a dict, expected tensors, numbers, strings, None"),
        ({(1,): X}, "x: found a dict"),
        ({True: X}, "x: found a dict"),
        ({1, 2}, "x: found a set"),
        (1j, "x: found a complex"),
        (b"bytes", "x: found a bytes"),
        (object(), "x: found a object"),
        (range(3), "x: found a range"),
        (Config, "x: found a type"),
        (collections.defaultdict(list), "x: found a defaultdict"),
        ([X, {"a": (X, object())}], r"x\[1\]\['a'\]\[1\]: found a object"),
        (Pair(X, Config(X, {3}))._asdict(), r"x\['right'\]\.mask: found a set"),
    ],
)
def test_what_no_tree_holds_is_refused_with_its_path(value, message):
    with pytest.raises(TreeError, match=message):
        flatten(value, "x")


def test_constants_in_subclasses_are_refused():
    class Flag(int):
        pass

    with pytest.raises(TreeError, match="found a Flag"):
        flatten(Flag(1), "x")


def test_fields_that_init_does_not_take_are_left_out():
    tree, _ = flatten(Config(X), "x")
    assert tree.keys == ("scale", "mask")
    assert build(tree, iter([X])).derived == 7


def test_classes_that_are_not_imported_get_a_stand_in():
    for value in (Pair(X, 2), Config(X, 2)):
        tree, _ = flatten(value, "x")
        away = dataclasses.replace(tree, type=f"not_imported:{type(value).__qualname__}")
        found = build(away, iter([X]))
        assert type(found).__name__ == type(value).__name__
        assert type(found) is not type(value)
        assert [getattr(found, key) for key in tree.keys] == [X, 2]
        assert type(build(away, iter([X]))) is type(found)  # so that results can be compared
        assert are(list(match(away, value, "x")), [X])


def test_classes_inside_functions_get_a_stand_in():
    class Local(NamedTuple):
        x: Any

    tree, _ = flatten(Local(X), "x")
    found = build(tree, iter([X]))
    assert type(found).__name__ == "Local"
    assert found.x is X


def test_empty_containers_survive():
    for value in ((), [], {}, collections.OrderedDict(), ((), [{}])):
        tree, tensors = flatten(value, "x")
        assert not tensors
        assert list(tree.paths("x")) == []
        assert is_same(build(Tree.from_dict(tree.to_dict()), iter(())), value)


def test_paths():
    value = {"a": X, "cfg": Config(X, (X, Pair(1, X))), 3: [X]}
    tree, _ = flatten(value, "v")
    assert list(tree.paths("v")) == [
        "v['a']",
        "v['cfg'].scale",
        "v['cfg'].mask[0]",
        "v['cfg'].mask[1].right",
        "v[3][0]",
    ]


@pytest.mark.parametrize("data", [{}, [], None, {"kind": "list", "unknown": 1}, {"items": 3, "kind": "list"}])
def test_other_data_is_no_tree(data):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Tree.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "dict", "keys": ["a", "b"], "items": [{"kind": "tensor"}]},
        {"kind": "tensor", "items": [{"kind": "tensor"}]},
        {"kind": "constant", "value": [1]},
        {"kind": "dict", "keys": [[1]], "items": [{"kind": "tensor"}]},
    ],
)
def test_data_that_contradicts_itself_is_no_tree(data):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Tree.from_dict(data)


def test_fields_are_matched_by_name():
    left, right = np.zeros(1), np.ones(1)
    tree, _ = flatten(Pair(left, right), "x")
    try:
        found = list(match(tree, Swapped(left=left, right=right), "x"))
    except TreeError:
        return
    assert are(found, [left, right])


def test_nan_matches_nan():
    tree, _ = flatten(math.nan, "x")
    assert list(match(tree, math.nan, "x")) == []


def test_build_calls_no_class_but_named_tuples_and_dataclasses(tmp_path):
    # A program's manifest may come from elsewhere: it must not start processes.
    touched = tmp_path / "touched"
    assert subprocess.Popen  # it is imported
    tree = Tree.from_dict(
        {
            "kind": "dataclass",
            "type": "subprocess:Popen",
            "keys": ["args"],
            "items": [
                {
                    "kind": "list",
                    "items": [
                        {"kind": "constant", "value": "touch"},
                        {"kind": "constant", "value": str(touched)},
                    ],
                }
            ],
        }
    )
    found = build(tree, iter(()))
    if isinstance(found, subprocess.Popen):
        found.wait()
    assert not touched.exists()
    assert found.args == ["touch", str(touched)]


def test_a_struct_of_c_is_a_named_tuple():
    array = np.zeros(3)
    tree, leaves = flatten(sys.float_info, "x")
    assert (tree.kind, tree.keys[0], tree.type, leaves) == ("named_tuple", "max", "sys:float_info", [])
    # torch.return_types.topk is built from a sequence; so is this one, which tests may have without torch.
    tree = Tree("named_tuple", (Tree("tensor"),) * 2, ("columns", "lines"), "os:terminal_size")
    result = build(tree, iter([array, array + 1]))
    assert type(result) is os.terminal_size
    assert result[1] is result.lines
    assert list(match(tree, result, "x")) == list(result)
    tree = Tree("named_tuple", (Tree("tensor"),) * 2, ("values", "indices"), "torch.return_types:nothing")
    assert build(tree, iter("ab"))._asdict() == {"values": "a", "indices": "b"}


def test_a_struct_with_fields_beside_its_items_is_no_tree():
    with pytest.raises(TreeError, match="a struct_time"):
        flatten(time.gmtime(0), "x")
