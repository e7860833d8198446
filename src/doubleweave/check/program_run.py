"""Run a language model's program over a place: prompts, then token by token. Knows nothing of sources or splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from doubleweave.runtime.llm.program import Program

Array = np.ndarray[Any, Any]


class Run(NamedTuple):
    """token_ids int64 [T], of which the last `num_singles` come one by one, behind `start` tokens; `cached`: rows of
    those, float32 [start, width] by value, and states."""

    token_ids: Array
    num_singles: int
    cached: Mapping[str, Array]
    start: int


class Runner(Protocol):
    """A program that runs in this process or in another."""

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]: ...

    def logits(self, run: Run) -> Array:
        """float32 [T, vocab]."""
        ...


class ProgramHere(NamedTuple):
    """A program that runs in this process; `encoder_input` is what a model with an encoder reads."""

    program: Program
    encoder_input: Array | None = None

    @property
    def methods(self) -> Mapping[str, Callable[..., Any]]:
        return self.program.methods

    def logits(self, run: Run) -> Array:
        session = self.program.session()
        if self.encoder_input is not None:
            session.encode(self.encoder_input)
        session.expect(run.start + len(run.token_ids))
        if run.cached:
            session.fill(run.cached, run.start)
        prompt = len(run.token_ids) - run.num_singles
        rows = [session.score(run.token_ids[:prompt])] if prompt else []
        singles = range(prompt, len(run.token_ids))
        rows += [session.append(run.token_ids[at : at + 1])[None] for at in singles]
        return np.concatenate(rows)
