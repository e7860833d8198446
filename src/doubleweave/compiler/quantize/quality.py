"""How far each quantized segment is from the float32 one, on the float32 model's own inputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit


def signal_to_noise(
    reference: TorchSplit, quantized: TorchSplit, names: Sequence[str], chunks: Sequence[Tensor]
) -> dict[str, float]:
    """Decibels for each named segment, the least of its outputs: 10 log10(sum of x² / sum of (x - x')²)."""
    signal: defaultdict[tuple[str, int], float] = defaultdict(float)
    noise: defaultdict[tuple[str, int], float] = defaultdict(float)

    def compared(name: str) -> Callable[..., Any]:
        exact, rounded = reference.module(name), quantized.module(name)

        def run(*inputs: Tensor) -> Any:
            outputs = exact(*inputs)
            # The exact outputs are passed on, so each segment is measured on true inputs, without earlier noise.
            for index, (a, b) in enumerate(zip(outputs, rounded(*inputs), strict=True)):
                signal[name, index] += a.double().square().sum().item()
                noise[name, index] += (a - b).double().square().sum().item()
            return outputs

        return run

    modules: dict[str, Callable[..., Any]] = {
        segment.name: compared(segment.name) if segment.name in names else reference.module(segment)
        for segment in reference.split.segments
    }
    for _ in run_chunks(reference, chunks, modules):
        pass
    found: dict[str, float] = {}
    for output, power in signal.items():
        found[output[0]] = min(found.get(output[0], math.inf), _decibels(power, noise[output]))
    return found


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
