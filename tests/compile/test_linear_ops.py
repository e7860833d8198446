"""Quantized linears: programs, whose weights lie as the kernel reads them, give what the operator says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import doubleweave as dw
from doubleweave.check.quick_weights import quantized_product
from doubleweave.compiler.graph.linear_ops import dequantized, linear_quantized_reference, on_grids
from doubleweave.compiler.quantize.formats import INT4, INT4_OFFSETS, INT8

FORMS = [INT4, INT4_OFFSETS, INT8]


class Linear(nn.Module):
    def __init__(self, parts, bias):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(part, requires_grad=False) for part in parts)
        self.bias = bias if bias is None else nn.Parameter(bias)

    def forward(self, x):
        parts = [*self.parts, None, None][:4]
        return torch.ops.doubleweave.linear_quantized(x, *parts, self.bias)


def numbers(*sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))) + 0.2


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(("columns", "features"), [(32, 5), (96, 64), (576, 150)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_programs_give_what_the_operator_says(form, columns, features, has_bias):
    linear = Linear(form.convert(numbers(features, columns)), numbers(features) if has_bias else None)
    shapes = {"x": {0: torch.export.Dim("T", min=1, max=32)}}
    program = dw.compile(linear, (numbers(20, columns),), dynamic_shapes=shapes)
    for rows in (1, 2, 17, 32):
        x = numbers(rows, columns)
        found, wanted = program(x), linear(x)
        off = (found - wanted).abs()
        # A number halfway between two steps may be rounded the other way.
        steps = x.abs().amax(1, keepdim=True) / 127
        largest = dequantized(*linear.parts).abs().max()
        assert (off <= 1e-5 * wanted.abs().max() + 2 * steps * largest).all()
        assert (off <= 1e-5 * wanted.abs().max()).float().mean() > 0.9


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_rows_do_not_depend_on_those_beside_them(form):
    linear = Linear(form.convert(numbers(70, 96)), None)
    program = dw.compile(
        linear, (numbers(20, 96),), dynamic_shapes={"x": {0: torch.export.Dim("T", min=1, max=64)}}
    )
    x = numbers(64, 96)
    whole = program(x)
    for rows in (1, 2, 3, 5, 7, 12, 40):
        assert torch.equal(program(x[:rows].contiguous()), whole[:rows])


def test_linears_share_rounded_rows():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (
                Linear(INT8.convert(numbers(6, 30)), None),
                Linear(INT4.convert(numbers(8, 32)), None),
            )

        def forward(self, x):
            return self.one(x[:, :30] * 2), self.two(x), self.two(x) + 1

    program = dw.compile(Two(), (numbers(5, 32),))
    for found, wanted in zip(program(numbers(5, 32)), Two()(numbers(5, 32)), strict=True):
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_give_no_number(bad):
    linear = Linear(INT8.convert(numbers(6, 96)), None)
    program = dw.compile(linear, (numbers(3, 96),))
    x = numbers(3, 96)
    x[1, 70] = bad
    for found in (program(x), linear(x)):
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()


def test_the_check_computes_the_same_in_blocks():
    parts, bias, x = INT4_OFFSETS.convert(numbers(5000, 64)), numbers(5000), numbers(3, 64)
    assert torch.allclose(quantized_product(x, *parts, bias), linear_quantized_reference(x, *parts, bias))
    exact = on_grids(x) @ dequantized(*parts).T + bias
    assert torch.allclose(linear_quantized_reference(x, *parts, bias), exact, atol=1e-5)
