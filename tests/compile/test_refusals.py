"""Every refusal on the way from a module and a policy to a call, with its message; docs/refusals.md is their table."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import doubleweave as dw
from doubleweave import Dynamic, Static

DOCS = Path(__file__).parents[2] / "docs" / "refusals.md"
aten = torch.ops.aten


class Calls(nn.Module):
    """Hands its arguments to a nested module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class One(Calls):
    def forward(self, x):
        return self.inner(x)


class Two(Calls):
    def forward(self, x, y):
        return self.inner(x, y)


class Twice(Calls):
    def forward(self, x, y):
        return self.inner(x, y), self.inner(y, x)


class ListOf(Calls):
    def forward(self, x):
        return self.inner([x, x])


class Rows(Calls):
    def forward(self, x):
        return self.inner(x, x.shape[0])


class Scale(nn.Module):
    def forward(self, x, n=1):
        return x * n


class Product(nn.Module):
    def forward(self, xs):
        return xs[0] * xs[1]


class Doubles(nn.Module):
    def forward(self, a, b):
        return a * 2, b * 2


class Add(nn.Module):
    def forward(self, a, b):
        return a + b


class MatMul(nn.Module):
    def forward(self, a, b):
        return a @ b


class Basic(nn.Module):
    def __init__(self):
        super().__init__()
        self.matmul = MatMul()

    def forward(self, x, y):
        return self.matmul(self.matmul(x, y), x)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x.sum(0))
        return x + self.total


def model(function: Callable[..., Any], **attributes: Any) -> nn.Module:
    """A module of class Model whose forward is this function."""
    found = type("Model", (nn.Module,), {"forward": function})()
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def linear(width: int = 4) -> nn.Module:
    return nn.Linear(width, width)


def rows(*sizes: int) -> Any:
    return torch.ones(sizes)


X = torch.ones(3, 4)
T = Dim("T", min=1, max=64)
M, K, N = (Dim(name, min=1, max=10) for name in "mkn")


def split(module: nn.Module, *args: Any, policy: Any = None, dims: Any = None) -> None:
    """Compile; what is refused here is refused before anything is lowered."""
    dw.compile(module, args, dynamic_shapes=dims, policy=policy)


def fc(rule: Any, key: Any = "fc") -> None:
    split(model(lambda self, x: self.fc(x), fc=linear()), X, policy={key: rule})


def dims_of(dims: Any) -> None:
    fc(Dynamic(dims))


def inner(module: nn.Module, *args: Any, rule: Any = None, dims: Any = None) -> None:
    """A nested module under a rule."""
    split(module, *args, policy={"inner": rule or Dynamic()}, dims=dims)


def whole(function: Callable[..., Any], *args: Any, **attributes: Any) -> None:
    """A module without a policy."""
    split(model(function, **attributes), *(args or (X,)))


def chunked(
    function: Callable[..., Any],
    x: Any = X,
    axis: int = 0,
    sizes: tuple[int, ...] = (1, 4),
    **attributes: Any,
) -> None:
    """A nested module whose rows are cut into chunks."""
    rule = Static(chunk={"x": axis}, sizes=sizes)
    inner(One(model(function, **attributes).eval()), x, rule=rule, dims={"x": {axis: T}})


def basic(dims: Any) -> None:
    split(Basic(), rows(3, 6), rows(6, 3), policy={"matmul": Dynamic(dims)})


def remember(self: Any, x: Any) -> Any:
    self.last = x * 2
    return x + 1


def shared_state() -> None:
    counter = Counter()
    root = model(lambda self, x: self.inner(self.counter(x)), counter=counter, inner=One(counter))
    split(root, X, policy={"inner": Dynamic()})


def append(self: Any, x: Any) -> Any:
    self.kept.append(x)
    return sum(self.kept)


def keep_first(self: Any, x: Any) -> Any:
    self.last = x if self.last is None else self.last
    return x + self.last.sum()


def resize(self: Any, x: Any) -> Any:
    self.total = torch.cat((self.total, x[0]))
    return x + 1


def change(self: Any, x: Any) -> Any:
    return x.add_(1)


def train(self: Any, x: Any) -> Any:
    return F.dropout(x, 0.5, self.training)


def branch(self: Any, x: Any) -> Any:
    return torch.cond(x.sum() > 0, lambda y: y.clone(), lambda y: -y, (x,))


def unregistered(self: Any, x: Any) -> Any:
    self.kept[0].add_(1)
    return x + self.kept[0]


def swap(self: Any, x: Any) -> Any:
    a = self.a.clone()
    self.a.copy_(self.b)
    self.b.copy_(a)
    return x + 1


def counts(self: Any, x: Any) -> Any:
    self.count += 1
    return x * self.count


def two_pieces(self: Any, x: Any) -> Any:
    self.total.add_(x.sum(0))
    return x + self.fc(self.total)


def grow(self: Any, x: Any) -> Any:
    return x + self.weight.add_(1)


def prints(self: Any, x: Any) -> Any:
    aten._print("x")
    return x + 1


_NOTHING = object()


class Called(nn.Module):
    """What calls are refused of."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x, ids, pair, n=2, y=_NOTHING, *, mask=None, config=_NOTHING):
        self.total.add_(x.sum(0))
        return {"sum": x * n + self.embedding(ids) + y, "last": pair["a"] - pair["b"]}


@cache
def program() -> Any:
    return dw.compile(
        Called(),
        (X, torch.tensor([1, 2, 3]), {"a": X, "b": X}, 2, X),
        dynamic_shapes={"x": {0: T}, "ids": {0: T}, "y": {0: T}},
    )


def call(**changed: Any) -> Any:
    """Call the program with some of its arguments changed, or left out ("leave")."""
    given = {"x": X, "ids": torch.tensor([1, 2, 3]), "pair": {"a": X, "b": X}, "y": X, **changed}
    return program()(**{name: value for name, value in given.items() if not isinstance(value, str)})


def results(*, first: Any = None, second: Any = None) -> list[Any]:
    return [torch.empty(3, 4) if value is None else value for value in (first, second)]


@cache
def folder() -> Path:
    """A temporary folder; its path is shown as "folder"."""
    return Path(tempfile.mkdtemp(prefix="refusals."))


def under_a_file() -> None:
    (folder() / "file").write_text("")
    dw.compile(nn.ReLU(), (X,), out=folder() / "file" / "program")


def out(name: str, content: str | None = None) -> None:
    """Compile into a place where something else is."""
    path = folder() / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    dw.compile(nn.ReLU(), (X,), out=folder() / name.partition("/")[0] if "/" in name else path)


def out_in_use() -> None:
    before = os.getcwd()
    (folder() / "here").mkdir(exist_ok=True)
    os.chdir(folder() / "here")
    try:
        dw.compile(nn.ReLU(), (X,), out=".")
    finally:
        os.chdir(before)


def set_state(name: str, value: Any) -> None:
    program().state[name] = value


def delete_state() -> None:
    del program().state["total"]


def set_threads() -> None:
    program().threads = 0


class Case(NamedTuple):
    """`when` and `advice` are the table's first and last column, `message` what `provoke` raises."""

    id: str
    when: str
    provoke: Callable[[], Any]
    message: str
    advice: str


CASES = {
    "The policy": [
        Case(
            "policy_type",
            "The policy is no dict",
            lambda: split(linear(), X, policy=[("", Static())]),
            "PolicyError: policy: found a list, expected a dict",
            "Write `{key: rule}`.",
        ),
        Case(
            "rule_type",
            "A value is no rule",
            lambda: fc(Static),
            "PolicyError: policy: 'fc' is the class Static, expected doubleweave.Static(…) or "
            "doubleweave.Dynamic(…)",
            "Write `Static()`, `Static(device=…)`, `Dynamic(…)`.",
        ),
        Case(
            "device",
            "A device is no name",
            lambda: fc(Static(device="npu 0")),
            "PolicyError: policy: 'fc': found device 'npu 0', expected a name such as 'npu' or 'cpu'",
            "A device is a name of your choice: letters, digits, `.`, `_` and `-`.",
        ),
        Case(
            "sizes_without_chunk",
            "`sizes` without `chunk`",
            lambda: fc(Static(sizes=(1, 8))),
            "PolicyError: policy: 'fc': sizes=(1, 8) are those of chunks, and it has no chunk; add "
            'chunk={"argument": axis}',
            "Say which axis is cut into chunks of these sizes, or leave `sizes` out.",
        ),
        Case(
            "chunk_empty",
            "`chunk` names nothing",
            lambda: fc(Static(chunk={})),
            "PolicyError: policy: 'fc': found chunk={}, expected {\"argument\": axis, …}",
            "Name the axis of each argument that has the rows.",
        ),
        Case(
            "size_range",
            "A chunk of a size that cannot be",
            lambda: fc(Static(chunk={"input": 0}, sizes=(0,))),
            "PolicyError: policy: 'fc': found size 0, expected 1 to 4096 rows",
            "Give whole numbers of rows.",
        ),
        Case(
            "key_type",
            "A key of another kind",
            lambda: fc(Static(), 3),
            "PolicyError: policy: found key 3, expected a module name, a pattern 're:…', a module "
            "class or an operator such as torch.ops.aten.softmax.int",
            "Use the module's name, not the module itself.",
        ),
        Case(
            "key_pattern",
            "A pattern that cannot be read",
            lambda: fc(Static(), "re:("),
            "PolicyError: policy: 're:(' is not a pattern (missing ), unterminated subpattern at position 0)",
            "Python's `re` reads what follows `re:`.",
        ),
        Case(
            "key_unknown",
            "A name that no module has",
            lambda: fc(Static(), "Fc"),
            "PolicyError: policy: key 'Fc' matches no module of Model; names near it: fc",
            "`dict(module.named_modules())` has all names.",
        ),
        Case(
            "key_without_modules",
            "A name, and the module has none nested",
            lambda: split(nn.ReLU(), X, policy={"fc": Static()}),
            "PolicyError: policy: key 'fc' matches no module of ReLU; it has no nested modules",
            'The whole module is `""`.',
        ),
        Case(
            "pattern_unknown",
            "A pattern that no name matches in full",
            lambda: fc(Static(), "re:layers.*"),
            "PolicyError: policy: pattern 're:layers.*' matches no module of Model; its names are fc",
            "Patterns match whole names.",
        ),
        Case(
            "class_unknown",
            "A class that no module has",
            lambda: fc(Static(), nn.Conv1d),
            "PolicyError: policy: no module is a Conv1d; this one has Linear, Model",
            "Take one of those that it has.",
        ),
        Case(
            "two_rules",
            "One module under two names with two rules",
            lambda: split(
                (lambda fc: model(lambda self, x: self.a(self.b(x)), a=fc, b=fc))(linear()),
                X,
                policy={"a": Static(), "b": Dynamic()},
            ),
            "PolicyError: policy: 'a' and 'b' are one module, and have different rules; give it one",
            "Name it once, or twice with the same rule.",
        ),
        Case(
            "operator_chunk",
            "An operator with `chunk`",
            lambda: fc(Static(chunk={"x": 0}), aten.linear.default),
            "PolicyError: policy: aten.linear.default is an operator, whose sizes are those of what "
            "it is called with; leave chunk out",
            "Name the module around the operator where it has to be cut.",
        ),
        Case(
            "operator_dims",
            "An operator with dims",
            lambda: fc(Dynamic({"x": {0: M}}), aten.linear.default),
            "PolicyError: policy: aten.linear.default is an operator, whose sizes are those of what "
            "it is called with; leave dims out",
            "Name the module around the operator where dims are needed.",
        ),
        Case(
            "operator_unknown",
            "An operator that is not called",
            lambda: fc(Dynamic(), aten.softmax.int),
            "PolicyError: policy: Model does not call aten.softmax.int; operators that it calls: "
            "aten.linear.default",
            "Take one of those that it calls.",
        ),
        Case(
            "never_called",
            "A module whose `forward` is not called",
            lambda: split(
                model(lambda self, x: self.layers[0](x), layers=nn.ModuleList([linear()])),
                X,
                policy={"layers": Static()},
            ),
            "PolicyError: policy: 'layers' names 'layers', whose forward is never called for these "
            "arguments; leave the key out, or name the module whose forward is",
            "Name the modules in the list, or the one around it.",
        ),
    ],
    "Dims": [
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
            lambda: inner(
                model(lambda self, x: self.inner(x, 3), inner=Scale()), X, rule=Dynamic({"n": {0: M}})
            ),
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
            'two; dims that would work: {"a": {0: m, 1: k}, "b": {0: k, 1: n}}',
            "Copy the dims of the message, with a `Dim` for each letter.",
        ),
        Case(
            "dims_two_for_one",
            "Two dims for axes that must be equal",
            lambda: basic({"a": {0: M, 1: K}, "b": {0: Dim("q", min=1, max=10), 1: N}}),
            "SplitError: 'matmul': its dims do not fit what it computes; dims that would work: {\"a\": "
            '{0: m, 1: k}, "b": {0: k, 1: n}}',
            "Copy the dims of the message, with a `Dim` for each letter.",
        ),
        Case(
            "dims_fixed_axis",
            "A `Dim` for an axis that can have one size only",
            lambda: dims_of({"input": {1: M}}),
            "SplitError: 'fc': its dims do not fit what it computes; dims that would work: {\"input\": "
            "{0: m}}",
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
    ],
    "Static modules": [
        Case(
            "static_varies",
            "A `Static` module without chunks is called with sizes that vary",
            lambda: inner(One(linear()), X, rule=Static(), dims={"x": {0: T}}),
            "PolicyError: 'inner', called at model.py:12, in forward: axis 0 of input is 1 to 64, "
            "but 'inner' makes it Static(), which needs a fixed size; cut it into chunks with "
            'chunk={"input": 0}, or make the module Dynamic',
            "Cut the axis into chunks, or make the module `Dynamic`.",
        ),
        Case(
            "static_whole_varies",
            "The whole module is `Static` without chunks, and `dynamic_shapes` let it vary",
            lambda: split(linear(), X, policy={"": Static()}, dims={"input": {0: T}}),
            "PolicyError: 'glue_0': the policy's '' makes it Static(), but sizes in it vary (T "
            "from 1 to 64); name the axes to cut with chunk={…}, or make it Dynamic()",
            'Cut the axis into chunks: `{"": Static(chunk={"x": 0})}`.',
        ),
        Case(
            "chunk_unknown",
            "`chunk` names no tensor",
            lambda: fc(Static(chunk={"x": 0})),
            "PolicyError: 'fc': chunk names 'x', expected one of its tensors: input",
            "Names are those of the parameters of this module's `forward`; `xs[0]`, `d['a']` inside lists and dicts.",
        ),
        Case(
            "chunk_axis",
            "`chunk` names an axis that the tensor does not have",
            lambda: fc(Static(chunk={"input": 2})),
            "PolicyError: 'fc': chunk={'input': 2}, but input has 2 axes, 0 to 1",
            "Axes count from 0; -1 is the last one.",
        ),
        Case(
            "chunk_sizes_differ",
            "Arguments that are cut have different numbers of rows",
            lambda: inner(Two(Doubles()), X, rows(5, 4), rule=Static(chunk={"a": 0, "b": 0})),
            "PolicyError: 'inner', called at model.py:12, in forward: the axes to cut into chunks "
            "have sizes 3, 5, expected the same for all of a, b",
            "Cut only arguments that have the same rows.",
        ),
        Case(
            "chunk_whole_sizes_differ",
            "Arguments of the whole module that are cut have different numbers of rows",
            lambda: split(Doubles(), X, rows(5, 4), policy={"": Static(chunk={"a": 0, "b": 0})}),
            "PolicyError: Doubles: dim 'T' stands for axis 0 of a, which is 3, and for axis 0 of b, "
            'which is 5: one Dim means equal sizes, so give them two; dims that would work: {"a": '
            '{0: m, 1: k}, "b": {0: n, 1: p}}',
            "Cut only arguments that have the same rows.",
        ),
        Case(
            "chunk_whole_dim",
            "The whole module is cut along an axis that `dynamic_shapes` leave to torch",
            lambda: split(
                linear(), X, policy={"": Static(chunk={"input": 0})}, dims={"input": {0: Dim.AUTO}}
            ),
            "PolicyError: Linear: axis 0 of input is cut into chunks, and needs a "
            "torch.export.Dim(name, min=…, max=…) in dynamic_shapes",
            "Give the axis a `Dim` with a range.",
        ),
        Case(
            "chunk_shape",
            "A result has no axis of rows, or more than one",
            lambda: chunked(lambda self, x: x.sum(0)),
            "SplitError: 'inner': its result inner has shape [4], expected one axis of T rows, as "
            "many as go in: it cannot run chunk by chunk; make it Dynamic",
            "What adds up rows belongs in a `Dynamic` module around or beside this one.",
        ),
        Case(
            "rows_made",
            "Rows depend on how many there are",
            lambda: chunked(lambda self, x: x + torch.arange(x.shape[0])[:, None]),
            "SplitError: 'inner': its rows depend on one another (aten.arange is made from the "
            "number of rows), so it cannot be cut there; cut another axis, or make it Dynamic",
            "Take positions as an argument and cut them too.",
        ),
        Case(
            "rows_combined",
            "Each row meets each",
            lambda: chunked(lambda self, x: (x[:, None] * x[None]).sum(1)),
            "SplitError: 'inner': its rows depend on one another (aten.mul.Tensor combines rows with "
            "other rows), so it cannot be cut there; cut another axis, or make it Dynamic",
            "Make what mixes rows a `Dynamic` module of its own.",
        ),
        Case(
            "rows_as_weights",
            "Rows are the weights of an operator",
            lambda: chunked(lambda self, x: F.linear(torch.ones(2, 4), x)),
            "SplitError: 'inner': its rows depend on one another (aten.linear uses rows as weights), "
            "so it cannot be cut there; cut another axis, or make it Dynamic",
            "As above.",
        ),
        Case(
            "rows_product",
            "A product over the rows",
            lambda: chunked(lambda self, x: x @ (x.t() @ x)),
            "SplitError: 'inner': its rows depend on one another (aten.matmul adds up along the "
            "rows, or combines each with each), so it cannot be cut there; cut another axis, or make "
            "it Dynamic",
            "As above.",
        ),
        Case(
            "rows_over",
            "An operator over the rows",
            lambda: chunked(lambda self, x: x.softmax(0)),
            "SplitError: 'inner': its rows depend on one another (aten.softmax.int is over the "
            "rows), so it cannot be cut there; cut another axis, or make it Dynamic",
            "As above, or cut another axis.",
        ),
        Case(
            "rows_all_axes",
            "An operator over all axes",
            lambda: chunked(lambda self, x: x - x.sum()),
            "SplitError: 'inner': its rows depend on one another (aten.sum is over all axes), so it "
            "cannot be cut there; cut another axis, or make it Dynamic",
            "As above.",
        ),
        Case(
            "rows_dropped",
            "The axis of the rows goes",
            lambda: chunked(lambda self, x: x.squeeze(0)),
            "SplitError: 'inner': its rows depend on one another (aten.squeeze.dim drops the axis of "
            "the rows), so it cannot be cut there; cut another axis, or make it Dynamic",
            "Keep the axis.",
        ),
        Case(
            "rows_joined",
            "Rows are joined with something that has none",
            lambda: chunked(lambda self, x: torch.cat((x, torch.ones(1, 4)))[1:]),
            "SplitError: 'inner': its rows depend on one another (aten.cat joins rows with tensors "
            "that have none), so it cannot be cut there; cut another axis, or make it Dynamic",
            "Join them outside.",
        ),
        Case(
            "rows_picked",
            "Some rows are picked",
            lambda: chunked(lambda self, x: x + x[0]),
            "SplitError: 'inner': its rows depend on one another (aten.select.int is along the "
            "rows), so it cannot be cut there; cut another axis, or make it Dynamic",
            "Pick them outside, and pass what was picked as an argument that is not cut.",
        ),
        Case(
            "rows_looked_up",
            "Rows are a table to look up in",
            lambda: chunked(lambda self, x: x + F.embedding(torch.tensor([0, 1]), x).sum(0)),
            "SplitError: 'inner': its rows depend on one another (aten.embedding looks up in the "
            "rows), so it cannot be cut there; cut another axis, or make it Dynamic",
            "Look up outside.",
        ),
        Case(
            "rows_attention",
            "Attention over the rows",
            lambda: chunked(lambda self, x: F.scaled_dot_product_attention(x, x, x), rows(1, 6, 4), 1),
            "SplitError: 'inner': its rows depend on one another (aten.scaled_dot_product_attention "
            "attends from rows to rows), so it cannot be cut there; cut another axis, or make it "
            "Dynamic",
            "Make the attention a `Dynamic` module of its own, nested in this one.",
        ),
        Case(
            "rows_unknown",
            "An operator that is not known to keep rows apart",
            lambda: chunked(lambda self, x: x.reshape(x.shape[0] * 2, 2).softmax(-1).reshape(-1, 4)),
            "SplitError: 'inner': cannot show that its rows are independent (they are not followed "
            "through aten.reshape), so it cannot run chunk by chunk; make it Dynamic",
            "Name the module around it `Dynamic`, or keep rows on an axis of their own.",
        ),
        Case(
            "rows_numbers",
            "With state, chunks one after the other give other numbers than all rows at once",
            lambda: chunked(lambda self, x: x.flip(0) + self.total.add_(1), total=nn.Buffer(torch.zeros(4))),
            "SplitError: 'inner': chunk by chunk it gives other numbers than at once "
            "(inner.total.next by 1 with 2 rows in chunks of 1): its rows depend on one another; "
            "make it Dynamic",
            "Make it `Dynamic`.",
        ),
        Case(
            "rows_cannot_run",
            "Chunks cannot be tried",
            lambda: chunked(
                lambda self, x: x + x.index_select(0, torch.tensor([2])) + self.total.add_(1),
                total=nn.Buffer(torch.zeros(4)),
            ),
            "SplitError: 'inner': chunk by chunk it gives other numbers than at once (it cannot be "
            "tried: IndexError: index out of range in self): its rows depend on one another; make it "
            "Dynamic",
            "Make it `Dynamic`.",
        ),
        Case(
            "state_sizes",
            "Chunks change a state, and 1 is not among their sizes",
            lambda: inner(One(Counter()), X, rule=Static(chunk={"x": 0}, sizes=(4, 16)), dims={"x": {0: T}}),
            "SplitError: 'inner': has state, which padding must not reach, so that chunks must add "
            "up exactly: expected 1 among its sizes, found 4, 16",
            "Add 1 to `sizes`: padding must not reach a state, so chunks have to add up.",
        ),
        Case(
            "state_swapped",
            "Chunks swap states",
            lambda: split(
                model(swap, a=nn.Buffer(torch.zeros(4)), b=nn.Buffer(torch.zeros(4))),
                X,
                dims={"x": {0: T}},
                policy={"": Static(chunk={"x": 0}, sizes=(1, 4))},
            ),
            "SplitError: 'glue_0': state 'a' becomes another state, or the same as one, which chunk "
            "by chunk is something else than at once; make it Dynamic",
            "Make the module that changes them `Dynamic`.",
        ),
        Case(
            "state_two_segments",
            "Chunks change a state that another segment uses too",
            lambda: split(
                model(two_pieces, fc=linear(), total=nn.Buffer(torch.zeros(4))),
                X,
                dims={"x": {0: T}},
                policy={"": Static(chunk={"x": 0}, sizes=(1, 4)), "fc": Dynamic()},
            ),
            "SplitError: 'glue_0': changes state 'total' chunk by chunk, and 2 segments use it; name "
            "the module that changes it in the policy by itself, or make it Dynamic",
            "Put what uses the state into one module, and name that.",
        ),
    ],
    "The module and its arguments": [
        Case(
            "module_type",
            "The module is none",
            lambda: dw.compile(torch.relu, (X,)),
            "PolicyError: module: found a builtin_function_or_method, expected a torch.nn.Module",
            "Put the function into the `forward` of a module.",
        ),
        Case(
            "kwargs_type",
            "`kwargs` is no dict",
            lambda: dw.compile(linear(), (), [X]),
            "PolicyError: kwargs: found a list, expected a dict",
            'Write `{"input": x}`.',
        ),
        Case(
            "args_type",
            "`args` is no tuple",
            lambda: dw.compile(linear(), X),
            "PolicyError: args: found a Tensor, expected a tuple of arguments",
            "Write `(x,)`.",
        ),
        Case(
            "args_missing",
            "Arguments do not fit `forward`",
            lambda: split(linear()),
            "PolicyError: Linear: missing a required argument: 'input'",
            "Pass what `forward` takes, in `args` and `kwargs`.",
        ),
        Case(
            "args_kind",
            "An argument of another kind",
            lambda: split(linear(), {X}),
            "SplitError: Linear: argument input is a set, expected tensors, numbers, strings, None, "
            "and tuples, lists, dicts, named tuples and dataclasses of them",
            "Pass tensors and constants.",
        ),
        Case(
            "args_dtype",
            "A tensor of another dtype or device",
            lambda: split(nn.Identity(), X.to(torch.complex64)),
            "SplitError: Identity: input is complex64 on cpu, expected a tensor on the CPU of "
            "float32, float64, float16, bfloat16, int64, int32, int16, int8, uint8, bool",
            "Convert it before; complex numbers as two real ones.",
        ),
        Case(
            "args_empty",
            "A tensor without elements",
            lambda: split(nn.Identity(), rows(0, 4)),
            "SplitError: Identity: input is empty, [0, 4], expected at least one element",
            "Give an example with at least one row.",
        ),
        Case(
            "call_arguments",
            "A nested module is called with arguments that do not fit",
            lambda: inner(model(lambda self, x: self.inner(), inner=Scale()), X),
            "PolicyError: 'inner', called at model.py:12, in <lambda>: missing a required argument: 'x'",
            "The module would not run in eager torch either.",
        ),
        Case(
            "call_kind",
            "A nested module gets an argument of another kind",
            lambda: inner(model(lambda self, x: self.inner(x, {2}), inner=Scale()), X),
            "SplitError: 'inner', called at model.py:12, in <lambda>: argument n is a set, expected "
            "tensors, numbers, strings, None, and tuples, lists, dicts, named tuples and dataclasses "
            "of them",
            "Name the module around it instead.",
        ),
        Case(
            "call_size",
            "A nested module gets a size that varies",
            lambda: inner(Rows(Scale()), X, dims={"x": {0: T}}),
            "SplitError: 'inner', called at model.py:12, in forward: argument n is a size that "
            "varies from call to call; take it from a tensor's shape inside the module, or pass a "
            "tensor",
            "Take the size inside, from a tensor's shape.",
        ),
        Case(
            "result_kind",
            "`forward` returns something else",
            lambda: whole(lambda self, x: {x}),
            "SplitError: Model: its result: found a set, expected tensors, numbers, strings, None, "
            "and tuples, lists, dicts, named tuples and dataclasses of them",
            "Return tensors and constants.",
        ),
        Case(
            "result_size",
            "`forward` returns a size that varies",
            lambda: split(model(lambda self, x: (x, x.shape[0])), X, dims={"x": {0: T}}),
            "SplitError: Model: its result[1] is a size that varies from call to call; leave it "
            "out, its caller has the shapes",
            "The caller has the shape; leave the size out.",
        ),
        Case(
            "result_none",
            "`forward` returns no tensor",
            lambda: whole(lambda self, x: None),
            "SplitError: Model: returns no tensor; expected at least one",
            "Return what it computes.",
        ),
        Case(
            "call_result_kind",
            "A nested module returns something else",
            lambda: inner(One(model(lambda self, x: {x})), X),
            "SplitError: 'inner', called at model.py:12, in forward: its result: found a set, "
            "expected tensors, numbers, strings, None, and tuples, lists, dicts, named tuples and "
            "dataclasses of them",
            "Name the module around it instead.",
        ),
        Case(
            "call_result_none",
            "A nested module returns no tensor",
            lambda: inner(model(lambda self, x: (x, self.inner(x)), inner=model(lambda self, x: None)), X),
            "SplitError: 'inner', called at model.py:12, in <lambda>: returns no tensor; name the "
            "module around it in the policy instead",
            "Name the module around it instead.",
        ),
        Case(
            "raises",
            "`forward` raises, or does what `torch.export` cannot follow",
            lambda: whole(lambda self, x: x @ x),
            "SplitError: Model: torch.export cannot trace it: RuntimeError (a and b must have same "
            "reduction dim, but got [3, 4] X [3, 4])",
            "Run the module in eager torch with these arguments, then through `torch.export.export`.",
        ),
        Case(
            "value_dependent",
            "A Python `if` on a tensor's value",
            lambda: whole(lambda self, x: x if x.sum() > 0 else -x),
            "SplitError: Model: an if, a loop or an index at model.py:12, in <lambda>, depends on "
            "the values of a tensor, which a program cannot follow; use torch.where, or take it "
            "outside the module",
            "Use `torch.where`.",
        ),
        Case(
            "control_flow",
            "`torch.cond` and the like",
            lambda: whole(branch),
            "SplitError: Model: has cond (data-dependent control flow), which a segment cannot hold; "
            "take the branch outside the module",
            "Branch outside, between two programs or two named modules.",
        ),
        Case(
            "data_dependent_size",
            "A size that depends on values",
            lambda: whole(lambda self, x: x[x > 0]),
            "SplitError: a size depends on the values of a tensor, expected sizes that follow from "
            "the inputs' shapes; keep the size and mask instead",
            "Keep the size, and mask.",
        ),
        Case(
            "size_expression",
            "A size that follows from the inputs' sizes by more than integer arithmetic",
            lambda: split(
                model(lambda self, x: F.interpolate(x[None, None], scale_factor=1.5)), X, dims={"x": {0: T}}
            ),
            "SplitError: a size follows from T by more than integer arithmetic (+, -, *, //, %, "
            "max, min); compute it with integers, or keep that axis fixed",
            "Keep that axis fixed, or compute with integers: `x.shape[0] * 3 // 2`.",
        ),
        Case(
            "token",
            "`forward` does something outside of tensors, such as printing",
            lambda: whole(prints),
            "SplitError: Model: does something beside computing tensors, such as printing, which a "
            "program cannot; take it out",
            "Take it out.",
        ),
        Case(
            "random",
            "Dropout in training mode, or another random operator",
            lambda: split(model(train), X),
            "SplitError: Model: aten.native_dropout.default draws random numbers; call module.eval() "
            "before compiling, or take the randomness as an argument",
            "Call `module.eval()`, or take the random tensor as an argument.",
        ),
        Case(
            "in_place",
            "`forward` changes an argument",
            lambda: whole(change),
            "SplitError: Model: changes its argument in place; expected a module that leaves its "
            "arguments as they are: write into a clone",
            "Begin with `x = x.clone()`.",
        ),
        Case(
            "batch_norm",
            "Batch norm in training mode",
            lambda: whole(lambda self, x: self.norm(x), norm=nn.BatchNorm1d(4)),
            "SplitError: Model: has a batch norm in training mode, whose statistics are those of "
            "each call; call module.eval() before compiling",
            "Call `module.eval()`.",
        ),
        Case(
            "kept_list",
            "`forward` changes a list or a dict of the module",
            lambda: whole(append, kept=[]),
            "SplitError: Model: forward changes the list 'kept', which a program does not "
            "remember; make it a buffer with register_buffer",
            "What is kept from call to call is a buffer of a fixed size.",
        ),
        Case(
            "kept_new",
            "`forward` leaves something in an attribute that its next call reads",
            lambda: whole(keep_first, last=None),
            "SplitError: Model: a second call gives other results, by what forward left in 'last', "
            "which a program does not remember; make it a buffer with register_buffer",
            "Make it a buffer. (An attribute that is only written is left as it was, and refused nothing.)",
        ),
        Case(
            "argument_array",
            "An example argument of another library",
            lambda: split(linear(), X.numpy()),
            "PolicyError: Linear: argument input is a ndarray, expected a torch.Tensor: a module "
            "runs in torch when it is compiled; use torch.as_tensor",
            "Convert the example; the program itself takes NumPy and JAX arrays too.",
        ),
        Case(
            "python_state",
            "`forward` changes a Python number or text of the module",
            lambda: whole(counts, count=0),
            "SplitError: Model: forward sets 'count' to 1, which a program does not remember; make "
            "it a buffer with register_buffer",
            'What changes is a buffer: `self.register_buffer("count", torch.tensor(0))`.',
        ),
        Case(
            "parameter_changed",
            "`forward` changes a parameter",
            lambda: whole(grow, weight=nn.Parameter(torch.zeros(4), requires_grad=False)),
            "SplitError: Model: changes 'weight' in forward, expected a buffer; make it one with "
            "register_buffer",
            "What changes is a buffer.",
        ),
        Case(
            "buffer_size",
            "A buffer gets another size",
            lambda: whole(resize, total=nn.Buffer(torch.zeros(4))),
            "SplitError: buffer 'total' of Model: torch.float32[4] becomes torch.float32[8] in "
            "forward; expected a state of one size and dtype",
            "Make it as large as it can become, and keep how much of it counts in a second buffer.",
        ),
        Case(
            "leak",
            "A tensor leaves a nested module by another way than its result",
            lambda: inner(model(lambda self, x: self.inner(x) + self.inner.last, inner=model(remember)), X),
            "SplitError: Model: a tensor computed inside 'inner' is used outside it "
            "(aten.mul.Tensor) without being returned; return it from that module's forward (what a "
            "forward hook of it computes counts as outside)",
            "Return it. (A forward hook on a nested module is such a way too: name the module around it.)",
        ),
        Case(
            "state_inside_and_outside",
            "A module with state is shared by a named module and one around or beside it",
            lambda: shared_state(),
            "SplitError: Model: changes buffer 'counter.total', which is also 'inner.inner.total' "
            "in 'inner'; name the module that has the buffer in the policy",
            "Name the shared module too.",
        ),
        Case(
            "buffer_of_another",
            "A buffer that a nested module changes is used outside it",
            lambda: inner(model(lambda self, x: self.inner.total * 2 + self.inner(x), inner=Counter()), X),
            "SplitError: Model: uses buffer 'inner.total', which 'inner' changes; return it from "
            "there, or name the module that has the buffer in the policy",
            "Return it from the nested module.",
        ),
    ],
    "Lowering and writing": [
        Case(
            "lower",
            "The backend cannot lower an operator",
            lambda: whole(lambda self, x: torch.linalg.lu_factor(x[:, :3])[0]),
            "LowerError: segment glue_0: xnnpack cannot lower it (AttributeError: 'WithEffects' "
            "object has no attribute '_schema')",
            "Take the operator out, or replace it.",
        ),
        Case(
            "no_kernel",
            "The runtime does not have an operator",
            lambda: whole(lambda self, x: torch.linalg.svd(x)[1]),
            "LowerError: segment glue_0: ExecuTorch has no kernel for aten._linalg_svd.U; replace "
            "the operator, or take it out of the model",
            "Take the operator out, or replace it.",
        ),
        Case(
            "out_type",
            "`out` is no path",
            lambda: dw.compile(nn.ReLU(), (X,), out=3),
            "PolicyError: out: found 3, expected the path of a folder to write",
            "Give the path of a folder, or leave it out.",
        ),
        Case(
            "out_file",
            "`out` is a file",
            lambda: out("file", ""),
            "LowerError: file: is a file, expected a folder to write; choose another one with out=",
            "Give a folder.",
        ),
        Case(
            "out_other_files",
            "`out` has other files in it",
            lambda: out("notes/todo.txt", ""),
            "LowerError: notes: is a folder with other files in it, expected an empty or missing "
            "folder or an older program; choose another one with out=",
            "Give a folder that is new, empty, or has an older program.",
        ),
        Case(
            "out_parent",
            "`out` cannot be made",
            under_a_file,
            "LowerError: file/program: cannot be made: File exists; choose another folder with out=",
            "Give a folder that you may write.",
        ),
        Case(
            "out_in_use",
            "`out` cannot be replaced, here the working folder",
            out_in_use,
            "LowerError: .: cannot be written: Device or resource busy; choose another folder with out=",
            "Give a folder that no program uses.",
        ),
    ],
    "Calling": [
        Case(
            "call_missing",
            "An argument is missing, unknown or one too many",
            lambda: call(x="leave"),
            "InputError: Called: missing a required argument: 'x'; expected Called(x, ids, pair, "
            "n=2, y=..., *, mask=None, config=...)",
            "`inspect.signature(program.methods[name])` has what it takes.",
        ),
        Case(
            "call_missing_behind_default",
            "The same, behind arguments with defaults",
            lambda: call(y="leave"),
            "InputError: Called: missing a required argument: 'y'; expected Called(x, ids, pair, "
            "n=2, y=..., *, mask=None, config=...)",
            "Its default is nothing that a program can keep: pass it.",
        ),
        Case(
            "call_not_compiled",
            "An argument that was left out when the module was compiled",
            lambda: call(config=1),
            "InputError: Called: config was given, but not when the module was compiled: leave it "
            "out, or compile with it",
            "Compile with it, or leave it out.",
        ),
        Case(
            "call_optional",
            "An optional tensor that was left out when the module was compiled",
            lambda: call(mask=X),
            "InputError: Called, mask: found a tensor, expected None (constants are compiled in)",
            "Compile with it, or leave it out.",
        ),
        Case(
            "call_constant",
            "Another flag, number or text than was compiled",
            lambda: call(n=3),
            "InputError: Called, n: found 3, expected 2 (constants are compiled in)",
            "Compile with this one; a nested module may be called with several.",
        ),
        Case(
            "call_no_tensor",
            "No tensor",
            lambda: call(x=[1.0]),
            "InputError: Called, x: found a list of 1, expected a tensor",
            "Pass a NumPy array, a torch tensor or a JAX array.",
        ),
        Case(
            "call_container",
            "A list, tuple or dict of another form",
            lambda: call(pair={"a": X}),
            "InputError: Called, pair: found a dict with keys a, expected a dict with keys a, b",
            "Pass it as it was when the module was compiled.",
        ),
        Case(
            "call_dtype",
            "A tensor of another dtype",
            lambda: call(x=X.double()),
            "InputError: Called, x: found dtype float64, expected float32",
            "Convert it: nothing is cast silently.",
        ),
        Case(
            "call_device",
            "A tensor on another device",
            lambda: call(x=X.to("meta")),
            "InputError: Called, x: found a tensor on meta, expected one on the CPU; call .cpu()",
            "Call `.cpu()`.",
        ),
        Case(
            "call_layout",
            "A sparse or nested tensor",
            lambda: call(x=X.to_sparse()),
            "InputError: Called, x: found a torch.sparse_coo tensor, expected a dense one",
            "Call `.to_dense()`.",
        ),
        Case(
            "call_rank",
            "More or fewer axes",
            lambda: call(x=X[0]),
            "InputError: Called, x: found shape [4], expected [T, 4] with T in 1..64",
            "Add or drop an axis.",
        ),
        Case(
            "call_shape",
            "Another fixed size",
            lambda: call(x=rows(3, 5)),
            "InputError: Called, x: found shape [3, 5], expected [T, 4] with T in 1..64",
            "Only axes with a name may vary.",
        ),
        Case(
            "call_equal",
            "Axes that must be equal are not",
            lambda: call(ids=torch.tensor([1, 2])),
            "InputError: Called, ids: found shape [2], expected [T] with T in 1..64, where T = 3 "
            "from what came before",
            "Sizes of one name are equal in all arguments.",
        ),
        Case(
            "call_range",
            "A size outside its range",
            lambda: call(x=rows(65, 4)),
            "InputError: Called, x: found shape [65, 4], expected [T, 4] with T in 1..64: T is 65",
            "Compile with a larger `max`.",
        ),
        Case(
            "run",
            "A method fails, here an index beyond the embedding",
            lambda: call(ids=torch.tensor([1, 2, 10])),
            "RunError: method 'glue_0' failed in aten.embedding: Check failed (indices_ptr[i] < "
            "weight_height): indices_ptr[2] 10 >= weight.size(0) 10",
            "The text after the name is ExecuTorch's; mostly a value is out of range.",
        ),
    ],
    "Results in memory of your own (`out=`)": [
        Case(
            "out_count",
            "More or fewer tensors than results",
            lambda: call(out=[torch.empty(3, 4)]),
            "InputError: Called, out: found 1 tensors, expected 2",
            "One for each tensor of the result, in order.",
        ),
        Case(
            "out_kind",
            "Memory that cannot be written",
            lambda: call(out=results(second=[0.0])),
            "InputError: Called, out: found a list, expected contiguous, writable float32 with room "
            "for [3, 4]: a NumPy array or a torch tensor",
            "Give a NumPy array or a torch tensor.",
        ),
        Case(
            "out_fit",
            "Another dtype, too little room, read-only or not contiguous",
            lambda: call(out=results(second=torch.empty(2, 4))),
            "InputError: Called, out: found float32[2, 4], expected contiguous, writable float32 "
            "with room for [3, 4]",
            "Give memory for the largest result that you expect.",
        ),
        Case(
            "out_shared",
            "The memory is that of an argument, or of another result",
            lambda: call(out=results(first=X)),
            "InputError: out: the memory for result 0 is also that of x; give it memory of its own",
            "Give each result memory of its own.",
        ),
    ],
    "States, threads": [
        Case(
            "state_unknown",
            "A name that no state has",
            lambda: program().state["count"],
            "InputError: state 'count': there is no such state; this program has total",
            "`list(program.state)` has all names.",
        ),
        Case(
            "state_shape",
            "A value of another dtype or shape",
            lambda: set_state("total", np.zeros(3)),
            "InputError: state 'total': found float64[3], expected float32[4]",
            "Convert it: nothing is cast silently.",
        ),
        Case(
            "state_delete",
            "A state is deleted",
            delete_state,
            "InputError: state 'total': cannot be deleted; reset() gives it its first value",
            "A state belongs to its program.",
        ),
        Case(
            "threads",
            "More threads than cores, or none",
            set_threads,
            "InputError: threads: found 0, expected 1 to 8 (the cores of this machine)",
            "Give a number in the range.",
        ),
    ],
}
ALL = {case.id: case for cases in CASES.values() for case in cases}


@cache
def refusal(name: str) -> str:
    """The error that a case raises, as Python shows it; what differs from machine to machine made the same."""
    with pytest.raises(dw.DoubleweaveError) as caught:
        ALL[name].provoke()
    text = f"{caught.typename}: {caught.value}"
    text = re.sub(r"test_refusals\.py:\d+", "model.py:12", text)
    text = re.sub(r"1 to \d+ \(the cores", "1 to 8 (the cores", text)
    text = re.sub(r"/\S*/doubleweave\.\w+/", "", text)
    return text.replace(f"{folder()}/", "")


@pytest.fixture(scope="module", autouse=True)
def clean():
    yield
    shutil.rmtree(folder())
    folder.cache_clear()


@pytest.mark.parametrize("case", ALL.values(), ids=lambda case: case.id)
def test_refusal(case):
    assert refusal(case.id) == case.message


# Names of torch's and ExecuTorch's that say nothing to the reader of a message, and options of the command line.
INTERNALS = (
    r"\b[su]\d+\b|tensors_\d|Traceback|TORCH_LOGS|SymInt|Guard|_native_|TruncToInt|KernelCall|::| -o\b"
)


@pytest.mark.parametrize("case", ALL.values(), ids=lambda case: case.id)
def test_message_is_one_line_without_internals(case):
    assert "\n" not in case.message
    assert not re.search(INTERNALS, case.message)


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def test_docs_have_every_refusal(request):
    """The table is made of what the cases raise; with --regenerate it is written anew."""
    lines = []
    for section, cases in CASES.items():
        lines += ["", f"## {section}", "", row("When", "Message", "What to do"), row("---", "---", "---")]
        lines += [row(case.when, f"`{refusal(case.id)}`", case.advice) for case in cases]
    table = "\n".join(lines).strip() + "\n"
    head, _, found = DOCS.read_text().partition("\n## ")
    if request.config.getoption("--regenerate"):
        DOCS.write_text(f"{head}\n{table}")
        found = table.removeprefix("## ")
    assert f"## {found}".splitlines() == table.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line and "| When" not in line]
    assert len(set(rows)) == len(rows) == len(ALL)


@pytest.mark.parametrize(
    "provoke",
    [
        pytest.param(lambda: split(linear(), X, policy=Static()), id="policy is a rule"),
        pytest.param(lambda: fc(Static(chunk="input")), id="chunk is a text"),
        pytest.param(lambda: fc(Static(chunk={"input": "0"})), id="axis is a text"),
        pytest.param(
            lambda: fc(Static(chunk={"input": 0}, sizes=4)),
            id="sizes is a number",
        ),
        pytest.param(lambda: split(linear(), "x"), id="argument is a text"),
        pytest.param(lambda: dw.compile(nn.ReLU, (X,)), id="module is a class"),
        pytest.param(lambda: dw.compile(None, (X,)), id="module is None"),
        pytest.param(lambda: dw.compile(nn.ModuleList([linear()]), (X,)), id="module is a container"),
        pytest.param(lambda: split(nn.Linear(4, 4, device="meta"), X), id="weights without numbers"),
        pytest.param(lambda: whole(unregistered, kept=[torch.zeros(4)]), id="state that is no buffer"),
        pytest.param(
            lambda: call(x=torch.nested.nested_tensor([X[0], X[1]])),
            id="nested tensor",
        ),
        pytest.param(lambda: call(x=np.zeros((3, 4), ">f4")), id="other byte order"),
        pytest.param(lambda: set_state("total", None), id="state is None"),
    ],
)
def test_what_nobody_thought_of(provoke):
    """Refused too, with an error of ours."""
    with pytest.raises(dw.DoubleweaveError):
        provoke()
