"""A pipeline written by hand over a model's own modules: projections on one worker, attention on another.

One `nn.Module` is compiled once. Its projections and MLPs are static (chunks of 128 rows, as an NPU takes them),
its attention is dynamic, and each is called by itself: while attention of one chunk runs on the worker of the
"cpu", the projections of the next one run on that of the "npu" (XNNPACK stands in for it here). The keys and
values of a chunk are written straight onto the next rows of a cache that this script owns.

    python examples/pipeline.py [--layers 4] [--tokens 2048] [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

import doubleweave as dw

HIDDEN, HEADS, CHUNK, MOST_TOKENS = 512, 8, 128, 4096


class Projections(nn.Module):
    """x [T, hidden] -> q, k, v [T, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x)
        return self.q(y), self.k(y), self.v(y)


class Attention(nn.Module):
    """Causal attention of q [T, hidden] over k and v [S, hidden], T newest rows included -> [T, hidden]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_new, num_rows = q.shape[0], k.shape[0]
        q, k, v = (x.view(x.shape[0], HEADS, -1).transpose(0, 1) for x in (q, k, v))
        position = torch.arange(num_new).unsqueeze(1) + (num_rows - num_new)
        hidden = torch.arange(num_rows).unsqueeze(0) > position
        scores = (q @ k.transpose(1, 2)) * (HIDDEN // HEADS) ** -0.5
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        return (weights @ v).transpose(0, 1).reshape(num_new, HIDDEN)


class Mlp(nn.Module):
    """The attended rows and the residual [T, hidden] -> [T, hidden]."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        x = x + self.o(attended)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections, self.attention, self.mlp = Projections(), Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(*self.projections(x)), x)


class Model(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compile_model(model: nn.Module) -> dw.ModuleProgram:
    new, rows = Dim("T", min=1, max=MOST_TOKENS), Dim("S", min=1, max=MOST_TOKENS)
    return dw.compile(
        model,
        (torch.zeros(CHUNK, HIDDEN),),
        dynamic_shapes={"x": {0: Dim("tokens", min=1, max=MOST_TOKENS)}},
        policy={
            Projections: dw.Static(device="npu", chunk={"x": 0}, sizes=(CHUNK,)),
            Mlp: dw.Static(device="npu", chunk={"attended": 0, "x": 0}, sizes=(CHUNK,)),
            Attention: dw.Dynamic({"q": {0: new}, "k": {0: rows}, "v": {0: rows}}, device="cpu"),
        },
    )


def run(program: dw.ModuleProgram, x: np.ndarray, is_pipelined: bool) -> np.ndarray:
    """All chunks through all layers, either one call behind the other or as futures."""
    layers = range(sum(name.endswith(".attention") for name in program.methods))
    caches = [[np.empty_like(x) for _ in "kv"] for _ in layers]
    written: list[list[dw.Result]] = [[] for _ in layers]
    results = []
    for start in range(0, len(x), CHUNK):
        end = start + CHUNK
        hidden = x[start:end]
        for layer, (k, v) in zip(layers, caches, strict=True):
            projections, attention, mlp = (
                program.methods[f"layers.{layer}.{name}"] for name in ("projections", "attention", "mlp")
            )
            out = [np.empty((CHUNK, HIDDEN), np.float32), k[start:end], v[start:end]]
            if is_pipelined:
                written[layer].append(projections.submit(hidden, out=out))
                # It reads the rows of every chunk so far.
                attended = attention.submit(out[0], k[:end], v[:end], after=written[layer])
                hidden = mlp.submit(attended, hidden)
            else:
                projections(hidden, out=out)
                hidden = mlp(attention(out[0], k[:end], v[:end]), hidden)
        results.append(hidden)
    return np.concatenate([r.result() for r in results] if is_pipelined else results)


def main() -> None:
    parser = argparse.ArgumentParser(description="Projections and attention as a pipeline of futures.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 128, at most 4096")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.tokens % CHUNK or not CHUNK <= args.tokens <= MOST_TOKENS or min(args.layers, args.runs) < 1:
        parser.error(f"tokens must be a multiple of {CHUNK} up to {MOST_TOKENS}, layers and runs at least 1")
    torch.manual_seed(0)
    model = Model(args.layers).eval()
    program = compile_model(model)
    program.threads = 1  # as a worker has, so that the two ways differ in the overlap alone
    x = torch.randn(args.tokens, HIDDEN)
    with torch.no_grad():
        wanted = model(x).numpy()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for count in range(args.runs + 1):
        for is_pipelined in (False, True):
            begin = time.perf_counter()
            found = run(program, x.numpy(), is_pipelined)
            if count:  # the first one loads and warms up
                seconds[is_pipelined].append(time.perf_counter() - begin)
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    for is_pipelined, name in ((False, "one call behind the other"), (True, "as futures")):
        all_ms = sorted(1000 * s for s in seconds[is_pipelined])
        print(f"{name:<28} {statistics.median(all_ms):7.1f} ms  [{all_ms[0]:.1f}, {all_ms[-1]:.1f}]")
    ratios = [a / b for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(f"{'speed-up':<28} {statistics.median(ratios):7.2f}     [{min(ratios):.2f}, {max(ratios):.2f}]")


if __name__ == "__main__":
    main()
