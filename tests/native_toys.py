"""Small real methods for the tests of the native module, lowered once for all of them.

Shape legend: T rows (1 … 128, dynamic), S keys, H hidden.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

H = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


class Mlp(torch.nn.Module):
    def __init__(self, hidden: int = H, inner: int = 96) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden, inner)
        self.down = torch.nn.Linear(inner, hidden)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.ops.doubleweave.attention(q, k, v, HEADS, KV_HEADS, HEAD_DIM**-0.5, 0, 0.0)


class Rotary(torch.nn.Module):
    def forward(self, x, cos, sin):
        return torch.ops.doubleweave.rotary(x, cos, sin, HEADS)


class Passing(torch.nn.Module):
    """Gives an input back, and a view of the other."""

    def forward(self, x, y):
        return x, y.view(2, 8), x + y


class Add(torch.nn.Module):
    def forward(self, x, y):
        return x + y


class And(torch.nn.Module):
    def forward(self, x, y):
        return torch.logical_and(x, y)


class MatMul(torch.nn.Module):
    """Not delegated: two dynamic inputs whose inner sizes may disagree at run time."""

    def forward(self, x, y):
        return torch.mm(x, y)


def quantized(module: torch.nn.Module) -> torch.nn.Module:
    """Dynamic int8 activations, int8 weights: XNNPACK's qd8."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    quantize_(
        module,
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
    )
    return module


def lower(methods, path: Path, *, unplanned: bool = True) -> Path:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    edge = to_edge_transform_and_lower(
        methods,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    planning = MemoryPlanningPass(alloc_graph_input=not unplanned, alloc_graph_output=not unplanned)
    program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    with path.open("wb") as file:
        program.write_to_file(file)
    return path


@functools.cache
def toy_modules() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "mlp": Mlp().eval(),
        "mlp_b": Mlp().eval(),
        "int8": quantized(Mlp().eval()),
        "heavy": Mlp(256, 1024).eval(),
    }


def toy_program(path: Path) -> Path:
    import doubleweave.compiler.graph.ops  # noqa: F401 (defines the operators)

    rows = torch.export.Dim("T", min=1, max=128)
    keys = torch.export.Dim("S", min=1, max=4096)
    methods = {}
    for name, module in toy_modules().items():
        x = torch.randn(1, 5, module.up.in_features)
        methods[name] = torch.export.export(module, (x,), dynamic_shapes=({1: rows},), strict=False)
    methods["fixed"] = torch.export.export(toy_modules()["mlp"], (torch.randn(1, 8, H),), strict=False)
    q = torch.randn(1, 5, HEADS * HEAD_DIM)
    kv = torch.randn(1, 9, KV_HEADS * HEAD_DIM)
    methods["attention"] = torch.export.export(
        Attention(), (q, kv, kv + 1), dynamic_shapes=({1: rows}, {1: keys}, {1: keys}), strict=False
    )
    cos = torch.randn(1, 5, HEAD_DIM)
    methods["rotary"] = torch.export.export(
        Rotary(), (q, cos, cos + 1), dynamic_shapes=({1: rows},) * 3, strict=False
    )
    methods["passing"] = torch.export.export(Passing(), (torch.randn(16), torch.randn(16)), strict=False)
    for dtype in (torch.int64, torch.bfloat16):
        x = torch.ones(2, 3).to(dtype)
        name = str(dtype).removeprefix("torch.")
        methods[f"add_{name}"] = torch.export.export(Add(), (x, x + 1), strict=False)
    x = torch.ones(2, 3, dtype=torch.bool)
    methods["and_bool"] = torch.export.export(And(), (x, ~x), strict=False)
    inner = torch.export.Dim("inner", min=1, max=16)
    methods["matmul"] = torch.export.export(
        MatMul(),
        (torch.randn(3, 4), torch.randn(4, 5)),
        dynamic_shapes=({1: inner}, {0: inner}),
        strict=False,
    )
    return lower(methods, path)


def rows_of(num_rows: int, hidden: int = H, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, num_rows, hidden), dtype=np.float32)


def run(instance, x: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    assert instance.run([x], [out]) == [x.shape]
    return out


def expected(module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()
