"""Each operator that XNNPACK's delegates take, alone and with other arguments than the defaults, against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import doubleweave as dw
from doubleweave.check.rounding import excess
from function_module import Of


class Addmm(nn.Module):
    def __init__(self, *bias, **factors):
        super().__init__()
        self.weight, self.bias, self.factors = nn.Parameter(rows(16, 6)), nn.Parameter(rows(*bias)), factors

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight, **self.factors)


def rows(*sizes):
    return torch.randn(sizes, generator=GENERATOR)


def norm(kind, width):
    """A batch norm with statistics of its own."""
    found = kind(width, eps=0.1)
    found.running_mean.copy_(rows(width))
    found.running_var.copy_(rows(width).exp())
    return found


GENERATOR = torch.Generator().manual_seed(0)
X = torch.cat((torch.linspace(-6, 6, 120), torch.tensor([-100.0, -30, -20, -10, 10, 20, 30, 100]))).view(
    8, 16
)
Y = X.flip(1) + 0.37
FAR = torch.tensor([[0.0, -0.0, 1e-30, 1e5, -1e5, 3e9, -3e9, 1e15, -1e15, 3e38, -3e38, math.inf, -math.inf]])
IMAGE, LINE = rows(1, 4, 12, 14), rows(2, 4, 15)

ONE = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "elu": lambda x: F.elu(x, 0.3),
    "celu": lambda x: F.celu(x, 0.7),
    "hardswish": F.hardswish,
    "leaky relu": lambda x: F.leaky_relu(x, 0.3),
    "leaky relu below 0": lambda x: F.leaky_relu(x, -0.3),
    "leaky relu above 1": lambda x: F.leaky_relu(x, 1.5),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 3.0),
    "hardtanh from -1": lambda x: F.hardtanh(x, -1.0, 2.0),
    "clamp min": lambda x: x.clamp(min=-0.5),
    "clamp max": lambda x: x.clamp(max=0.5),
    "clamp int": lambda x: x.clamp(-1, 2),
    "clamp reversed": lambda x: x.clamp(2.0, 1.0),
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": lambda x: x.abs().log(),
    "rsqrt": lambda x: x.abs().rsqrt(),
    "power": lambda x: (x.abs() + 0.1) ** -0.5,
    "softmax 0": lambda x: x.softmax(0),
    "softmax": lambda x: x.softmax(-1),
    "softmax hidden": lambda x: x.masked_fill(x > 0, -math.inf).softmax(-1),
    "rsub": lambda x: torch.rsub(x, 2.0, alpha=3.0),
    "add alpha number": lambda x: torch.add(x, 3.0, alpha=2),
    "slice step": lambda x: x[:, 1:13:3],
    "slice from the end": lambda x: x[:, -5:-1],
    "view": lambda x: x.permute(1, 0).reshape(4, -1),
    "half": lambda x: F.gelu(x.half(), approximate="tanh").float(),
    "mean of halves": lambda x: x.half().mean(-1, keepdim=True, dtype=torch.float32),
    "mean in doubles": lambda x: x.mean(-1, keepdim=True, dtype=torch.float64),
}
TWO = {
    "add alpha": lambda x, y: torch.add(x, y, alpha=2.5),
    "sub alpha": lambda x, y: torch.sub(x, y, alpha=2.5),
    "div floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "add hardtanh": lambda x, y: F.hardtanh(x + y, -2.0, 0.5),
    "add and its relu": lambda x, y: (x + y, F.relu(x + y)),
    "maximum of a column": lambda x, y: torch.maximum(x, y[:, :1]),
    "cat of six": lambda x, y: torch.cat([x, y, x, y, x, y], 1),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "baddbmm": lambda x, y: torch.baddbmm(x[None], x[None], y.mT[None] @ x[None], beta=0.5, alpha=2.0),
    "addmm": lambda x, y: torch.addmm(x[:, :8], x, y.mT, beta=0.5, alpha=2.0),
}
IMAGES = {
    "mean": lambda x: x.mean((2, 3)),
    "mean of rows": lambda x: x.mean((1, 2), keepdim=True),
    "largest": lambda x: x.max(2)[0],
    "largest kept": lambda x: x.max(3, keepdim=True)[0],
    "largest of channels": lambda x: x.max(1, keepdim=True).values,
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1, dilation=(2, 1), ceil_mode=True),
    "max pool below 0": lambda x: F.max_pool2d(-x.abs() - 5, 3, 2, 1),
    "max pool of one": lambda x: F.max_pool2d(x[0], 2),
    "avg pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg pool without padding": lambda x: F.avg_pool2d(x, (2, 3), (3, 2), (1, 0), count_include_pad=False),
    "avg pool ceil": lambda x: F.avg_pool2d(x, 5, 3, ceil_mode=True),
    "avg pool divisor": lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "avg pool of one": lambda x: F.avg_pool2d(x[0], 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (5, 4)),
    "bilinear": lambda x: F.interpolate(x, (24, 5), mode="bilinear"),
    "bilinear corners": lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=True),
    "bilinear factor": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear factors": lambda x: F.interpolate(x, scale_factor=(0.6, 2.3), mode="bilinear"),
    "bilinear double": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear recomputed": lambda x: F.interpolate(x, None, 1.7, "bilinear", recompute_scale_factor=True),
    "nearest": lambda x: F.interpolate(x, (7, 9)),
    "pad": lambda x: F.pad(x, (1, 2, 3, 4), value=1.5),
    "pad channels": lambda x: F.pad(x, (0, 0, 1, 0, 2, 0), value=-1.0),
    "pad reflect": lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "cat channels": lambda x: torch.cat([x, x[:, :2], x], 1),
    "unsqueeze": lambda x: x[0].unsqueeze(-1),
    "permute": lambda x: x.permute(0, 2, 3, 1).reshape(12, -1),
}
CONV = nn.Conv2d(4, 8, 3, stride=(2, 3), padding=(0, 2), dilation=(1, 2))
MODULES = {
    "conv": (CONV, IMAGE),
    "conv relu6": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU6()), IMAGE),
    "conv hardtanh": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, stride=2), nn.Hardtanh(-2.0, 0.5)), IMAGE),
    "conv reflect": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
    "transposed": (nn.ConvTranspose2d(4, 8, 3, 2, (1, 0), 1, 2, dilation=2), IMAGE),
    "transposed 1d": (nn.ConvTranspose1d(4, 8, 3, stride=3, output_padding=2, groups=2), LINE),
    "conv 1d": (nn.Conv1d(4, 4, 3, stride=2, padding=2, dilation=3), LINE),
    "norm": (norm(nn.BatchNorm2d, 4), IMAGE),
    "norm 1d": (norm(nn.BatchNorm1d, 4), LINE),
    "norm behind conv": (nn.Sequential(nn.Conv2d(4, 6, 3), norm(nn.BatchNorm2d, 6)), IMAGE),
    "norm behind linear": (nn.Sequential(nn.Linear(16, 6), norm(nn.BatchNorm1d, 6)), X),
    "norm behind transposed": (
        nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), norm(nn.BatchNorm2d, 6)),
        IMAGE,
    ),
    "layer norm": (nn.LayerNorm((12, 14), eps=0.1), IMAGE),
    "group norm": (nn.GroupNorm(2, 4), IMAGE),
    "rms norm": (nn.RMSNorm(14, eps=0.1), IMAGE),
    "prelu": (nn.PReLU(4, 0.3), IMAGE),
    "prelu rows": (nn.PReLU(16, 0.3), X),
    "prelu lines": (nn.PReLU(4, 0.3), LINE),
    "prelu behind linear": (nn.Sequential(nn.Linear(16, 6), nn.PReLU()), X),
    "addmm beta": (Addmm(6, beta=0.5), X),
    "addmm alpha": (Addmm(6, alpha=2.0), X),
    "addmm of a matrix": (Addmm(8, 6), X),
    "addmm of a column": (Addmm(8, 1), X),
    "addmm of a number": (Addmm(1), X),
    "addmm without bias": (Addmm(6, beta=0), X),
}
CASES = (
    {name: (Of(f), (X,)) for name, f in ONE.items()}
    | {name: (Of(f), (X, Y)) for name, f in TWO.items()}
    | {f"image: {name}": (Of(f), (IMAGE,)) for name, f in IMAGES.items()}
    | {name: (module.eval(), (x,)) for name, (module, x) in MODULES.items()}
)


def check(module, args):
    with torch.no_grad():
        found, wanted = dw.compile(module, args, check=False)(*args), module(*args)
    pairs = [(found, wanted)] if isinstance(wanted, torch.Tensor) else zip(found, wanted, strict=True)
    for a, b in pairs:
        assert excess(a, b) <= 1


@pytest.mark.parametrize("name", CASES)
def test_operator(name):
    check(*CASES[name])


@pytest.mark.parametrize("name", ["sigmoid", "gelu tanh", "tanh", "hardswish", "elu", "rsqrt", "softmax"])
def test_far_numbers(name):
    """Masks of -3e38 and infinities, and 0 where it has no finite result."""
    check(Of(ONE[name]), (FAR,))


def test_tanh_gelu_is_one_delegate():
    program = dw.compile(Of(ONE["gelu tanh"]), (X,))
    (segment,) = program.split.segments
    assert segment.num_delegated == segment.num_operators
