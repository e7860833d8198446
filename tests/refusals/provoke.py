"""A case of a refusal; small modules, and functions that compile or call them in a way that is refused."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import doubleweave as dw
from doubleweave import Dynamic, Static

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
