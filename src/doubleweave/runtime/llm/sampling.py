"""Choose the next token from logits. It knows nothing of programs or text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from doubleweave.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Greedy when temperature is 0, else softmax at that temperature over the smallest set of tokens whose
    probabilities reach `top_p` (nucleus sampling, Holtzman et al. 2020)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: found {self.temperature}, expected 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top-p: found {self.top_p}, expected more than 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed: found {self.seed}, expected 0 or more")


class Sampler:
    """Draws tokens one by one; two samplers with the same seed draw the same."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token id from logits, float32 [vocab]."""
        if self.sampling.temperature == 0.0:
            return int(np.argmax(logits))
        with np.errstate(over="ignore"):  # a temperature near zero: all but the largest become -inf
            scaled = (logits.astype(np.float64) - logits.max()) / self.sampling.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        kept = int(np.searchsorted(cumulative, self.sampling.top_p)) + 1
        chosen = order[: min(kept, len(order))]
        weights = probabilities[chosen]
        return int(self._random.choice(chosen, p=weights / weights.sum()))
