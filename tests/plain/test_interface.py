"""Interfaces: arguments are bound as Python binds them, and what does not fit is named."""

from __future__ import annotations

import collections
import inspect
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doubleweave.errors import InputError
from doubleweave.ir.interface import Interface, Parameter, parameters_of
from doubleweave.ir.manifest import from_plain, to_plain
from doubleweave.ir.trees import Tree, TreeError, flatten

X, Y, Z = np.zeros(1), np.ones(2), np.full(3, 3.0)
TENSOR = Tree("tensor")


def interface(forward, *args, **kwargs):
    parameters, _ = parameters_of(forward, args, kwargs)
    return Interface(parameters, TENSOR)


def are(left, right):
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def plain(x, y):
    pass


def defaults(x, scale=2.0, mask=None, *, flip=False, names=("a", "b")):
    pass


def only(x, /, y, *, z):
    pass


def variadic(x, *xs, **named):
    pass


@pytest.mark.parametrize(
    ("forward", "args", "kwargs", "tensors"),
    [
        (plain, (X, Y), {}, [X, Y]),
        (plain, (X,), {"y": Y}, [X, Y]),
        (plain, (), {"y": Y, "x": X}, [X, Y]),
        (only, (X, Y), {"z": Z}, [X, Y, Z]),
        (only, (X,), {"z": Z, "y": Y}, [X, Y, Z]),
        (defaults, (X,), {}, [X]),
        (defaults, (X, 2.0, None), {"flip": False}, [X]),
        (defaults, (X,), {"mask": Y}, [X, Y]),
        (variadic, (X, Y, Z), {}, [X, Y, Z]),
        (variadic, (X,), {"b": Y, "a": Z}, [X, Y, Z]),
        (variadic, (X,), {}, [X]),
    ],
)
def test_what_was_compiled_can_be_called(forward, args, kwargs, tensors):
    parameters, found = parameters_of(forward, args, kwargs)
    assert are(found, tensors)
    made = Interface(parameters, TENSOR)
    assert are(made.bind("f", args, kwargs), tensors)
    assert len(made.input_names) == len(tensors)


@st.composite
def signatures(draw):
    """A signature, and a call that it takes: each parameter given by position, by name, or left to its default."""
    kinds = sorted(draw(st.lists(st.sampled_from([0, 1, 3]), max_size=5)))
    has_default = False
    parameters, args, kwargs = [], [], {}
    by_name = False
    for number, kind in enumerate(kinds):
        name = f"p{number}"
        has_default = draw(st.booleans()) or (has_default and kind != 3)
        default = draw(st.sampled_from([None, 1, 2.5, "s", True])) if has_default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect._ParameterKind(kind), default=default))
        how = draw(st.sampled_from(["position", "name", "default"]))
        value = default if has_default and draw(st.booleans()) else np.zeros(number)
        if how == "default" and has_default:
            by_name = True
        elif kind == 0 and by_name:
            pass  # what came before was left out, so this is too
        elif kind == 3 or by_name or (how == "name" and kind == 1):
            kwargs[name] = value
            by_name = True
        else:
            args.append(value)
    return inspect.Signature(parameters), tuple(args), kwargs


@given(signatures())
def test_arguments_are_bound_as_python_binds_them(drawn):
    signature, args, kwargs = drawn

    def forward():
        pass

    forward.__signature__ = signature
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # one without a default was left out
        with pytest.raises(TypeError):
            parameters_of(forward, args, kwargs)
        return
    bound.apply_defaults()
    wanted = [value for value in bound.arguments.values() if isinstance(value, np.ndarray)]
    made = interface(forward, *args, **kwargs)
    assert made.signature() == signature
    assert are(made.bind("f", args, kwargs), wanted)
    # By name where Python allows it: the same call.
    by_name = {n: v for n, v in bound.arguments.items() if signature.parameters[n].kind.value != 0}
    first = [v for n, v in bound.arguments.items() if signature.parameters[n].kind.value == 0]
    assert are(made.bind("f", first, by_name), wanted)


@pytest.mark.parametrize(
    ("made", "args", "kwargs", "message"),
    [
        (interface(plain, X, Y), (X,), {}, r"f: missing a required argument: 'y'; expected f\(x, y\)"),
        (interface(plain, X, Y), (X, Y, Z), {}, r"f: too many positional arguments; expected f\(x, y\)"),
        (interface(plain, X, Y), (X, Y), {"x": X}, "f: multiple values for argument 'x'"),
        (interface(plain, X, Y), (X, Y), {"q": X}, "f: got an unexpected keyword argument 'q'"),
        (interface(only, X, Y, z=Z), (), {"x": X, "y": Y, "z": Z}, "'x'.*positional"),
        (interface(only, X, Y, z=Z), (X, Y, Z), {}, "f: too many positional arguments"),
        (interface(plain, X, Y), (X, 3), {}, "f, y: found 3, expected a tensor"),
        (interface(plain, X, Y), (X, [Y]), {}, "f, y: found a list of 1, expected a tensor"),
        (
            interface(plain, [X, Y], {"a": Z}),
            ([X, Y], {"b": Z}),
            {},
            "f, y: found a dict with keys b, expected .* a",
        ),
        (
            interface(plain, [X, Y], {"a": Z}),
            ([X, 2], {"a": Z}),
            {},
            r"f, x\[1\]: found 2, expected a tensor",
        ),
        (
            interface(defaults, X),
            (X, 3.0),
            {},
            r"f, scale: found 3\.0, expected 2\.0 \(constants are compiled in\)",
        ),
        (interface(defaults, X, 3.0), (X,), {}, r"f, scale: found 2\.0, expected 3\.0"),
        (interface(defaults, X), (X,), {"mask": Y}, "f, mask: found a tensor, expected None"),
        (interface(defaults, X, mask=Y), (X,), {}, "f, mask: found None, expected a tensor"),
        (interface(defaults, X), (X,), {"flip": 0}, "f, flip: found 0, expected False"),
        (interface(variadic, X, Y), (X,), {}, r"f, xs: found a tuple of 0, expected a tuple of 1"),
        (interface(variadic, X), (X,), {"a": Y}, r"f, named: found a dict with keys a, expected .*\(none\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(made, args, kwargs, message):
    with pytest.raises(InputError, match=message):
        made.bind("f", args, kwargs)


def test_a_default_that_is_no_constant_is_left_out_or_compiled_with():
    def forward(x, w=Z):
        pass

    without = interface(forward, X)
    assert str(without.signature()) == "(x, w=...)"
    assert are(without.bind("f", (X,), {}), [X])
    with pytest.raises(
        InputError, match="f: w was given, but not when the module was compiled: leave it out"
    ):
        without.bind("f", (X, Z), {})
    given_ = interface(forward, X, Y)
    assert str(given_.signature()) == "(x, w)"
    assert are(given_.bind("f", (X,), {"w": Y}), [X, Y])


def test_a_tensor_in_place_of_a_default_may_come_after_constants():
    def forward(x, scale=2.0, w=Z):
        pass

    made = interface(forward, X, 2.0, Y)
    assert list(made.signature().parameters) == ["x", "scale", "w"]
    assert are(made.bind("f", (X, 2.0, Y), {}), [X, Y])
    with pytest.raises(InputError, match="w"):
        made.bind("f", (X,), {})


def test_a_signature_is_as_the_module_has_it():
    made = interface(defaults, X)
    assert str(made.signature()) == "(x, scale=2.0, mask=None, *, flip=False, names=...)"
    assert str(interface(only, X, Y, z=Z).signature()) == "(x, /, y, *, z)"
    assert str(interface(variadic, X, Y).signature()) == "(x, *xs, **named)"


def test_input_names_are_paths():
    point = collections.namedtuple("point", "u v")
    made = interface(variadic, {"a": X, 3: [Y]}, point(X, Y), Y, cfg=(Z, 2))
    assert made.input_names == ("x['a']", "x[3][0]", "xs[0].u", "xs[0].v", "xs[1]", "named['cfg'][0]")


def test_what_no_tree_holds_is_named():
    with pytest.raises(TreeError, match=r"y\[0\]: found a set"):
        parameters_of(plain, (X, [{1}]), {})
    with pytest.raises(TypeError, match="missing a required argument: 'y'"):
        parameters_of(plain, (X,), {})


def test_results_are_built_as_the_module_builds_them():
    tree, tensors = flatten({"a": X, "b": (Y, [Z, None, "text"])}, "")
    found = Interface((), tree).result(iter(tensors))
    assert found["a"] is X
    assert found["b"][0] is Y
    assert found["b"][1][1:] == [None, "text"]


@given(signatures())
def test_an_interface_is_plain_data(drawn):
    signature, args, kwargs = drawn

    def forward():
        pass

    forward.__signature__ = signature
    try:
        made = interface(forward, *args, **kwargs)
    except TypeError:
        return
    assert from_plain(Interface, json.loads(json.dumps(to_plain(made)))) == made


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("returns"),
        lambda data: data.update(parameters=3),
        lambda data: data["parameters"][0].update(kind="SIDEWAYS"),
        lambda data: data["parameters"][0].pop("default"),
        lambda data: data["parameters"][0].update(tree={"kind": "tensor", "color": "red"}),
        lambda data: data["parameters"][0].update(tree=[1]),
    ],
)
def test_other_data_is_no_interface(change):
    data = json.loads(json.dumps(to_plain(interface(plain, X, Y))))
    change(data)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        from_plain(Interface, data)


def test_parameters_compare_as_data():
    assert interface(plain, X, Y) == interface(plain, Y, Z)
    assert interface(plain, X, Y).parameters[0] == Parameter("x", "POSITIONAL_OR_KEYWORD", TENSOR, None)
    assert interface(plain, X, [Y]) != interface(plain, X, Y)
