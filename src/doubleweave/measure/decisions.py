"""Decisions of `auto`: runs the three fastest simulated choices for each prompt length and keeps the fastest here.

Predictions are some percent off, and often two choices are closer together than that. Nothing else should run on the
machine meanwhile.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np

from doubleweave._scheduling import lengths_up_to
from doubleweave.measure.segments import Progress
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.planner import WORTH, choice_of, merged, plan
from doubleweave.predict.profile import Decision, Profile
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Session, TokenIds
from doubleweave.schedule.choice import Choice

_FINALISTS = 3
# Choices that are predicted to be slower than the fastest by more than this are not tried.
_MARGIN = 0.25
# The longest prompt that is tried; its decision holds for longer ones.
_MOST_TOKENS = 4096
# Runs of each choice, for prompts of up to so many tokens: short ones are over before the machine has settled.
_RUNS = {512: 9, 1536: 5, _MOST_TOKENS: 3}


def tune(program: Program, profile: Profile, threads: int, progress: Progress) -> tuple[Decision, ...]:
    """Measure the finalists of each prompt length of a grid. Lengths between two of the grid go
    with the longer one. Raises InputError as `use_threads` does."""
    planner = RunPlanner(program.split, profile, program.model.max_context)
    lengths = lengths_up_to(min(program.model.max_context, _MOST_TOKENS))
    session = program.session("sequential", threads)
    ids = np.random.default_rng(0).integers(0, program.model.vocab_size, lengths[-1])
    found: list[Decision] = []
    for place, length in enumerate(lengths):
        progress(f"{length} tokens", place, len(lengths))
        times = _times(session, ids[:length], list(_finalists(planner, length, threads)))
        best = min(times.values())
        choice = next(choice for choice, took in times.items() if took <= best * (1 + WORTH))
        found.append(Decision(length, choice, round(times[choice], 6)))
    progress("done", len(lengths), len(lengths))
    return merged(found)


def _finalists(planner: RunPlanner, length: int, threads: int) -> Iterator[Choice]:
    """The choices that are fastest by prediction, the simple ones first, so that they win ties."""
    planned = plan(planner, length, threads)
    most = planned.candidates[0].makespan_s * (1 + _MARGIN)
    kept = [item for item in planned.candidates if item.makespan_s <= most][:_FINALISTS]
    yield from sorted((choice_of(item) for item in kept), key=lambda choice: len(choice.workers))


def _times(session: Session, ids: TokenIds, choices: list[Choice]) -> dict[Choice, float]:
    """The makespan of each choice in seconds: the median of the faster half of its runs, because the machine's other
    work only adds time. Choices take turns, in both orders, because the machine's speed drifts."""
    took: dict[Choice, list[float]] = {choice: [] for choice in choices}
    runs = next(count for tokens, count in _RUNS.items() if len(ids) <= tokens)
    for number in range(runs + 1):
        for choice in choices[:: -1 if number % 2 else 1]:
            session.use(choice)
            session.reset()
            makespan_s = session.append_recorded(ids).makespan_s
            if number:  # round 0 loads methods and touches memory
                took[choice].append(makespan_s)
    return {choice: statistics.median(sorted(took[choice])[: (runs + 1) // 2]) for choice in choices}
