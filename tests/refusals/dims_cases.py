"""Refusals of dims."""

from __future__ import annotations

from torch.export import Dim

from doubleweave import Dynamic
from refusals.provoke import (
    Add,
    Case,
    K,
    ListOf,
    M,
    N,
    Product,
    Scale,
    Twice,
    X,
    basic,
    dims_of,
    inner,
    linear,
    model,
    rows,
    split,
)

DIMS = [
    Case(
        "dims_type",
        "Dims are neither a dict nor a tuple",
        lambda: dims_of("m"),
        "PolicyError: 'fc': found dims 'm', expected a dict by argument or a tuple by position",
        'Write `{"x": {0: m}}`.',
    ),
    Case(
        "dims_too_many",
        "Dims by position for more arguments than there are",
        lambda: dims_of(({0: M}, {0: K})),
        "PolicyError: 'fc': found dims for 2 arguments, expected at most 1: input",
        "One entry for each argument of `forward`, `None` for those without.",
    ),
    Case(
        "dims_unknown_argument",
        "Dims name no argument",
        lambda: dims_of({"x": {0: M}}),
        "PolicyError: 'fc': dims name argument 'x', expected one of input",
        "Names are those of the parameters of this module's `forward`.",
    ),
    Case(
        "dims_of_constant",
        "Dims of an argument that is no tensor",
        lambda: inner(model(lambda self, x: self.inner(x, 3), inner=Scale()), X, rule=Dynamic({"n": {0: M}})),
        "PolicyError: 'inner': dims of n, which is the constant 3 and has no axes",
        "Leave the argument out of the dims, or pass a tensor.",
    ),
    Case(
        "dims_tree",
        "Dims of a list or dict are not built like it",
        lambda: inner(ListOf(Product()), X, rule=Dynamic({"xs": [{0: M}]})),
        "PolicyError: 'inner': the dims of xs are not built like it, a list of 2",
        "One entry for each item, `None` for those without.",
    ),
    Case(
        "dims_rank",
        "More or fewer dims than axes",
        lambda: dims_of({"input": (M,)}),
        "PolicyError: 'fc': found 1 dims for input, which has 2 axes",
        "One dim an axis, `None` for a fixed one, or a dict by axis.",
    ),
    Case(
        "dims_axes_type",
        "An argument's dims are neither a dict nor a tuple",
        lambda: dims_of({"input": M}),
        "PolicyError: 'fc': found dims Dim('m', min=1, max=10) for input, expected {axis: Dim}",
        'Write `{"input": {0: m}}`.',
    ),
    Case(
        "dims_axis",
        "An axis that the tensor does not have",
        lambda: dims_of({"input": {2: M}}),
        "PolicyError: 'fc': input has no axis 2; it has 2, 0 to 1",
        "Axes count from 0; -1 is the last one.",
    ),
    Case(
        "dims_dim",
        "A dim that is none",
        lambda: dims_of({"input": {0: "m"}}),
        "PolicyError: 'fc': axis 0 of input has dim 'm', expected torch.export.Dim(name, min=…, max=…)",
        "Make it with `torch.export.Dim`.",
    ),
    Case(
        "dims_number",
        "A number for an axis of another size",
        lambda: dims_of({"input": {0: 7}}),
        "PolicyError: 'fc': axis 0 of input is 3, and its dim says 7; give it a Dim, or leave it out",
        "Leave the axis out: it is fixed then.",
    ),
    Case(
        "dims_no_largest",
        "A `Dim` without `max`",
        lambda: dims_of({"input": {0: Dim("m")}}),
        "PolicyError: 'fc': dim 'm' has no largest size, and a dynamic method is planned for "
        "one; write Dim('m', min=…, max=…)",
        "Give `max`: memory is planned for it.",
    ),
    Case(
        "dims_auto_no_largest",
        "`Dim.AUTO` or `Dim.DYNAMIC` without `max`",
        lambda: dims_of({"input": {0: Dim.AUTO}}),
        "PolicyError: dim 'input_0' has no largest size, and a dynamic method is planned for "
        "one; give the axis a Dim(name, min=…, max=…)",
        "Give the axis a `Dim`.",
    ),
    Case(
        "dims_largest",
        "A `Dim` with a `max` beyond all memory",
        lambda: dims_of({"input": {0: Dim("m", max=2**40)}}),
        "PolicyError: 'fc': dim 'm' goes up to 1099511627776, expected at most 16777216",
        "Give the largest size that you need: memory is planned for it.",
    ),
    Case(
        "dims_least",
        "A `Dim` that begins at 0",
        lambda: dims_of({"input": {0: Dim("m", min=0, max=9)}}),
        "PolicyError: 'fc': dim 'm' begins at 0, expected at least 1",
        "Empty tensors are not run; begin at 1.",
    ),
    Case(
        "dims_twice",
        "Dims of the whole module in the policy and in `dynamic_shapes`",
        lambda: split(linear(), X, policy={"": Dynamic({"input": {0: M}})}, dims={"input": {0: M}}),
        "PolicyError: policy: '' gives dims for the whole module, and dynamic_shapes gives them "
        "too; leave one out",
        "Give them in one place.",
    ),
    Case(
        "dims_one_for_two",
        "One `Dim` for axes that a call gives different sizes",
        lambda: basic({"a": {0: M, 1: M}, "b": {0: M, 1: M}}),
        "PolicyError: 'matmul', called at model.py:12, in forward: dim 'm' stands for axis 0 of "
        "a, which is 3, and for axis 1 of a, which is 6: one Dim means equal sizes, so give them "
        'two; dims that would work: {"a": {0: m, 1: k}, "b": {0: k, 1: n}}, m from 1 to 10, k from 1 to 10, n from 1 '
        "to 10",
        "Copy the dims of the message, with a `Dim` of its range for each letter.",
    ),
    Case(
        "dims_two_for_one",
        "Two dims for axes that must be equal",
        lambda: basic({"a": {0: M, 1: K}, "b": {0: Dim("q", min=1, max=10), 1: N}}),
        "SplitError: 'matmul': its dims do not fit what it computes; dims that would work: {\"a\": "
        '{0: m, 1: k}, "b": {0: k, 1: n}}, m from 1 to 10, k from 1 to 10, n from 1 to 10',
        "Copy the dims of the message, with a `Dim` of its range for each letter.",
    ),
    Case(
        "dims_fixed_axis",
        "A `Dim` for an axis that can have one size only",
        lambda: dims_of({"input": {1: M}}),
        "SplitError: 'fc': its dims do not fit what it computes; it would work with fixed sizes: axis 1 of input is "
        "4",
        "Leave that axis out.",
    ),
    Case(
        "dims_missing",
        "Calls differ in an axis without a `Dim`",
        lambda: basic({"a": {0: M}, "b": {1: N}}),
        "PolicyError: 'matmul', called at model.py:12, in forward: axis 1 of a is 3, and "
        'elsewhere 6, but its dims do not name that axis; add {"a": {1: Dim(…)}}',
        "Name the axis, or leave `dims` out: then axes are dynamic where calls differ.",
    ),
    Case(
        "dims_range",
        "A call with a size outside a dim's range",
        lambda: basic({"a": {0: M, 1: Dim("k", min=1, max=4)}, "b": {0: Dim("k", min=1, max=4), 1: N}}),
        "PolicyError: 'matmul', called at model.py:12, in forward: axis 1 of a is 6, and its dim "
        "'k' allows 1 to 4; widen the dim, or narrow the caller's",
        "A nested dim's range holds all sizes that its callers can have.",
    ),
    Case(
        "dims_not_general",
        "Sizes that one call needs equal and another has different",
        lambda: inner(
            model(lambda self, x, y: (self.inner(x, x), self.inner(y, y[:1])), inner=Add()),
            rows(2, 4),
            rows(3, 4),
        ),
        "PolicyError: 'inner', called at model.py:12, in <lambda>: axis 0 of b is 1, expected "
        "a_0 = 3: give its dims so that they serve every call",
        "Give the module dims that hold for every call, or call it with the same form of sizes.",
    ),
    Case(
        "dims_only_ones",
        "Axes vary, and are 1 in every call's example",
        lambda: inner(Twice(Add()), rows(1, 4), rows(3, 4)),
        "PolicyError: 'inner': each of its calls has an axis of size 1 that varies; name its "
        "dims, Dynamic({argument: {axis: Dim(…)}})",
        "Name the dims of the module.",
    ),
]
