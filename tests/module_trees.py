"""Modules that several files of tests compile, and a program beside its module in eager torch."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

import doubleweave as dw


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


class Around(nn.Module):
    """Something before and after a nested module."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(self.inner(x * 2) - 1)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.count.add_(1)
        return x * self.count


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


SIZES = (4, 16)
