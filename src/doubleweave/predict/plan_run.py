"""From a program, a profile, a prompt length and a wish to a verified schedule: the only way there.

Sessions, predictions, plans and benchmarks ask a RunPlanner, so that a prediction is of the very run that happens.
doubleweave-run asks the same native planner with the content of run.json. It knows nothing of ExecuTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from doubleweave import _scheduling
from doubleweave.errors import InputError
from doubleweave.ir.split import FixedSizes, Split, most_rows
from doubleweave.predict.find_profile import num_cores
from doubleweave.predict.profile import MOST_THREADS, Profile, call_costs, costs_of
from doubleweave.schedule import scratch_groups
from doubleweave.schedule.choice import (
    Choice,
    Wish,
    as_choice,
    chunk_shape,
    chunks_of,
    devices_of,
    graph_of,
    static_device,
)
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.makers import Maker, make
from doubleweave.schedule.pattern import Want, pattern_of
from doubleweave.schedule.schedule import Schedule
from doubleweave.schedule.task_graph import TaskGraph
from doubleweave.schedule.verify import Verified, verify
from doubleweave.vendors.library import libraries_of


def overlapping_schedule(split: Split) -> str:
    """The schedule of several chunks where none was planned: a wavefront, and out of order with an NPU."""
    # Workers of a wavefront run every device's tasks; an NPU has workers of its own, which a strict order would leave
    # idle.
    has_npu = any(library.is_npu for library in libraries_of(split).values())
    return "out_of_order" if has_npu else "wavefront"


@dataclass(frozen=True)
class PlannedRun:
    """The run of a prompt: the choice, its task graph, the tasks' costs, and their schedule."""

    choice: Choice
    graph: TaskGraph
    costs: Costs
    schedule: Schedule

    @cached_property
    def verified(self) -> Verified:
        """The schedule, checked when first asked for; raises ScheduleError where it may not run."""
        return verify(self.schedule, self.graph)


class RunPlanner:
    """Plans the runs of one program on one machine. `max_tokens` are those of the context.

    Raises InputError where the profile has neither a segment's time nor its device.
    """

    def __init__(self, split: Split, profile: Profile, max_tokens: int) -> None:
        self.split = split
        self.profile = profile
        self.most_tasks = profile.most_tasks(devices_of(split))
        # Built once: only the lookup in them depends on the prompt.
        self._tables = profile.tables(split)
        machine = _scheduling.Machine(
            costs=self._tables,
            most_tasks=self.most_tasks,
            overlapping=overlapping_schedule(split),
            threads=profile.threads,
            decisions=[(decision.tokens, decision.choice) for decision in profile.decisions],
        )
        self._native = _scheduling.Planner(_outline(split, max_tokens), machine)

    def threads(self, asked: int | None, cores: int | None = None, most: int = MOST_THREADS) -> int:
        """The number of threads in all: `asked`; else that which the profile's decisions were made with; else that of
        the CPU of a chip that the profile describes; else `cores`, by default this machine's. A run here can have
        `most`; a prediction may be of a machine with more.

        Raises InputError for less than one, or more than a machine has.
        """
        if asked is None:
            return self._native.default_threads(cores or num_cores(), most)
        if not 1 <= asked <= MOST_THREADS:
            raise InputError(f"threads: found {asked}, expected 1 to {MOST_THREADS}")
        return asked

    def check(self, wish: Wish) -> None:
        """Raises InputError for a wish that does not fit the program; `threads` answers for its threads."""
        self._native.check(wish.schedule, 1, wish.workers, wish.chunk)

    def choose(self, wish: Wish, num_tokens: int) -> Choice:
        """The choice for a prompt of that length (native/scheduling/auto.cpp); `wish.threads` must be settled. Raises
        InputError for a wish that does not fit the program."""
        assert wish.threads is not None
        return as_choice(
            self._native.choose(num_tokens, wish.schedule, wish.threads, wish.workers, wish.chunk)
        )

    def settled(self, choice: Choice, threads: int, num_tokens: int) -> Choice:
        """Fit a choice that was made without regard to length to a prompt: a single chunk has nothing to overlap, so it
        runs on every thread."""
        return as_choice(self._native.settled(choice, threads, num_tokens))

    def candidates(self, num_tokens: int, threads: int) -> list[Choice]:
        """Every choice worth a try on so many threads in all that the profile's devices can run, simple ones first."""
        return [as_choice(found) for found in self._native.candidates(num_tokens, threads)]

    def best(self, num_tokens: int, threads: int) -> Choice:
        """Of the candidates the simplest within 1% of the fastest."""
        return as_choice(self._native.best(num_tokens, threads))

    def plan_run(
        self, choice: Choice, num_tokens: int, want: Want = "last", maker: Maker | None = None
    ) -> PlannedRun:
        """The run of a choice; `maker` builds the schedule, and `choice.schedule` is the name it is shown under.

        `want` "all" computes every row's outputs, as scoring a text needs. Raises ScheduleError and InputError.
        """
        graph = graph_of(self.split, choice, chunks_of(self.split, choice, num_tokens), want)
        costs = costs_of(self._tables, graph, choice.threads, len(choice.workers), all_rows=want == "all")
        if maker is None:
            schedule = make(choice.schedule, graph, choice.workers, costs, choice.threads)
        else:
            schedule = replace(maker(graph, choice.workers, costs), threads=choice.threads)
        return PlannedRun(choice, graph, costs, schedule)


def _outline(split: Split, max_tokens: int) -> _scheduling.Outline:
    shape = chunk_shape(split)
    return _scheduling.Outline(
        sizes=shape.sizes if isinstance(shape, FixedSizes) else (),
        most_rows=most_rows(shape),
        devices=devices_of(split),
        static_device=static_device(split),
        calls=call_costs(split),
        pattern=pattern_of(split, "last").native,
        scratch=_scheduling.Scratch(scratch_groups.blocks(split), scratch_groups.num_groups(split)),
        max_tokens=max_tokens,
    )
