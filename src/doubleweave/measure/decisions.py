"""The decisions of `auto`, measured: of the ways to run a prompt that the simulator finds fastest, the one that is.

Predictions are some percent apart from what happens, and often two ways are closer together than that. Nothing else
should run meanwhile.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import numpy as np

from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.planner import choice_of, lengths_up_to, merged, plan
from doubleweave.predict.profile import Decision, Profile
from doubleweave.runtime.llm.program import Program
from doubleweave.runtime.llm.session import Session, TokenIds
from doubleweave.runtime.threads import threads_or_all
from doubleweave.schedule.choice import Choice

Progress = Callable[[str, int, int], None]

_FINALISTS = 3
# A way that was predicted to be slower than the fastest by more than this is not tried.
_MARGIN = 0.25
# Of ways within this of the fastest the simplest is taken.
_WORTH = 0.01
# Longer prompts are run as the longest that is tried.
_MOST_TOKENS = 4096
# Runs of each way, for prompts of up to so many tokens: short ones are over before the machine has settled.
_RUNS = {512: 9, 1536: 5, _MOST_TOKENS: 3}


def tune(
    program: Program,
    profile: Profile,
    threads: int | None = None,
    *,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Decision, ...]:
    """Measure the finalists of each prompt length of a grid. Lengths between two of the grid go
    with the longer one. Raises InputError as `use_threads` does."""
    threads = threads_or_all(threads)
    planner = RunPlanner(program.split, profile, program.model.max_context)
    lengths = lengths_up_to(min(program.model.max_context, _MOST_TOKENS))
    session = program.session("sequential", threads)
    ids = np.random.default_rng(0).integers(0, program.model.vocab_size, lengths[-1])
    found: list[Decision] = []
    for place, length in enumerate(lengths):
        progress(f"{length} tokens", place, len(lengths))
        times = _times(session, ids[:length], list(_finalists(planner, length, threads)))
        best = min(times.values())
        choice = next(choice for choice, took in times.items() if took <= best * (1 + _WORTH))
        found.append(Decision(length, choice, round(times[choice], 6)))
    progress("done", len(lengths), len(lengths))
    return merged(found)


def _finalists(planner: RunPlanner, length: int, threads: int) -> Iterator[Choice]:
    """The fastest by prediction, in the planner's order: simple ones first."""
    planned = plan(planner, length, threads)
    most = planned.candidates[0].makespan_s * (1 + _MARGIN)
    kept = [item for item in planned.candidates if item.makespan_s <= most][:_FINALISTS]
    yield from sorted((choice_of(item) for item in kept), key=lambda choice: len(choice.workers))


def _times(session: Session, ids: TokenIds, choices: list[Choice]) -> dict[Choice, float]:
    """Makespans, medians of the faster half: what else goes on in a machine only adds. The choices take turns."""
    took: dict[Choice, list[float]] = {choice: [] for choice in choices}
    runs = next(count for tokens, count in _RUNS.items() if len(ids) <= tokens)
    for number in range(runs + 1):
        for choice in choices[:: -1 if number % 2 else 1]:
            session.use(choice)
            session.reset()
            session.append(ids, record=True)
            assert session.recorded is not None
            if number:
                took[choice].append(float(session.recorded.end_ns.max()) / 1e9)
    return {choice: statistics.median(sorted(took[choice])[: (runs + 1) // 2]) for choice in choices}
