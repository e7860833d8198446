"""Run a function of a program on the caller's tensors: plan, bind, execute.

Plans are kept for the sizes seen last. It knows nothing of Python arguments; `method.py` does.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from doubleweave import _native
from doubleweave.errors import InputError
from doubleweave.ir.split import Function, Split
from doubleweave.runtime.instances import Instances
from doubleweave.runtime.module.arrays import address_range
from doubleweave.runtime.module.states import States
from doubleweave.runtime.native_errors import as_run_errors
from doubleweave.schedule import module_plan
from doubleweave.schedule.module_steps import Plan, View
from doubleweave.timeline.timeline import Event, Timeline

_KEPT = 16  # plans, by sizes: each holds its run's buffers

Found = tuple[tuple[str, tuple[int, ...]], ...]  # dtype and sizes of each input


@dataclass
class _Prepared:
    plan: Plan
    instance: _native.Instance | None  # one method and nothing else: run without an execution
    execution: _native.Execution | None
    outside: dict[int, int]  # tensor of the caller or of a state -> region
    uses: list[str]  # names that calls take in turns


class Runner:
    """Runs functions of one program over one set of states.

    Calls that use a common method, or a common state, take turns; others run at the same time.
    """

    def __init__(self, split: Split, instances: Instances, states: States) -> None:
        self.split = split
        self.states = states
        self.timeline: Timeline | None = None
        self._instances = instances
        self._prepared: OrderedDict[tuple[int, Found, int], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def device(self, function: Function) -> str:
        """The device of a function's first segment; "cpu" where it has none."""
        for call in function.calls:
            if call.callee == "segment":
                return self.split.segment(call.segment).device
            return self.device(self.split.function(call.segment))
        return "cpu"

    def prepare(self, function: Function, name: str, found: Found, threads: int) -> _Prepared:
        """The bound plan for inputs of these dtypes and sizes; InputError where they do not fit."""
        key = (id(function), found, threads)
        with self._lock:
            if key in self._prepared:
                self._prepared.move_to_end(key)
                return self._prepared[key]
        plan = module_plan.make(self.split, function, name, found)
        with as_run_errors():
            made = self._make(plan, threads)
        with self._lock:
            self._prepared[key] = made
            while len(self._prepared) > _KEPT:
                self._prepared.popitem(last=False)
        return made

    def run(
        self, prepared: _Prepared, inputs: Sequence[Any], outputs: Sequence[Any], threads: int, record: bool
    ) -> None:
        """Read `inputs`, write `outputs` (one for each tensor of the results, each once)."""
        _check_apart(prepared.plan, inputs, outputs)
        with self._instances.turns.take(prepared.uses):
            with as_run_errors():
                if prepared.instance is not None and not record:
                    prepared.instance.run(list(inputs), list(outputs), threads)
                elif prepared.execution is not None:
                    self._execute(prepared, inputs, outputs, record)
            for state, times in prepared.plan.updates.items():
                self.states.updated(state, times)

    def _execute(
        self, prepared: _Prepared, inputs: Sequence[Any], outputs: Sequence[Any], record: bool
    ) -> None:
        assert prepared.execution is not None
        rebound = {}
        for index, region in prepared.outside.items():
            tensor = prepared.plan.tensors[index]
            if tensor.place == "input":
                rebound[region] = _native.Region.of(inputs[tensor.number], writable=False)
            elif tensor.place == "output":
                rebound[region] = _native.Region.of(outputs[tensor.number])
            else:
                rebound[region] = self.states.region(tensor.name, tensor.number)
        events = prepared.execution.run(0, record, rebound)
        if events is not None:
            self.timeline = _timeline(prepared.plan, events.tolist())

    def _make(self, made: Plan, threads: int) -> _Prepared:
        self._instances.load_all(made.methods())
        is_direct = (
            len(made.steps) == 1
            and made.steps[0].copy is None
            and [view.tensor for view in made.steps[0].reads] == list(made.inputs)
            and [view.tensor for view in made.steps[0].writes] == list(dict.fromkeys(made.outputs))
        )
        instance = self._instances.get(made.steps[0].method) if is_direct else None
        outside, execution = self._bind(made, threads)  # a direct call needs it to be recorded
        uses = [f"plan {id(made)}", *(f"method {method}" for method in made.methods())]
        if made.updates or any(tensor.place == "state" for tensor in made.tensors):
            uses.append(f"states {id(self.states)}")
        return _Prepared(made, instance, execution, outside, uses)

    def _bind(self, made: Plan, threads: int) -> tuple[dict[int, int], _native.Execution | None]:
        if not made.steps:
            return {}, None
        buffers = _native.Buffers(list(made.buffer_bytes))
        regions = [buffers.region(number) for number in range(len(made.buffer_bytes))]
        used = [i for i, t in enumerate(made.tensors) if t.place != "buffer" and (t.readers or t.writers)]
        outside = {tensor: len(regions) + number for number, tensor in enumerate(used)}
        region_of = {index: tensor.number for index, tensor in enumerate(made.tensors)} | outside
        # Each run puts the caller's tensors and the states in place of these: address space that is never touched.
        stand_ins = _native.Buffers([made.tensors[index].num_bytes for index in used])
        regions += [stand_ins.region(number) for number in range(len(used))]

        def binding(view: View) -> _native.Binding:
            return _native.Binding(region_of[view.tensor], list(view.sizes), view.offset)

        methods = made.methods()
        tasks = []
        for number, step in enumerate(made.steps):
            if (copy := step.copy) is not None:
                copy = copy._replace(source=region_of[copy.source], target=region_of[copy.target])
                tasks.append(_native.Task.of_copy(_native.Copy(**copy._asdict()), [], number))
                continue
            instance = methods.index(step.method)
            tasks.append(
                _native.Task(instance, [*map(binding, step.reads)], [*map(binding, step.writes)], [], number)
            )
        instances = [self._instances.get(method) for method in methods]
        return outside, _native.Execution(instances, regions, tasks, [list(range(len(tasks)))], threads)


def _check_apart(made: Plan, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Refuse a result that would be written over an input, or over another result."""
    taken = [(made.tensors[t].name, *address_range(x)) for t, x in zip(made.inputs, inputs, strict=True)]
    for number, array in enumerate(outputs):
        what = f"result {number}"
        begin, end = address_range(array)
        for name, first, last in taken:
            if begin < last and first < end:
                raise InputError(
                    f"out: the memory for {what} is also that of {name}; give it memory of its own"
                )
        taken.append((what, begin, end))


def _timeline(made: Plan, events: list[list[int]]) -> Timeline:
    result = []
    for number, worker, start, end in events:
        step = made.steps[number]
        name = step.name if step.copy is None else f"{step.name} (copy)"
        result.append(Event(name, step.segment, step.device, step.chunk, worker, start, end))
    return Timeline(tuple(sorted(result, key=lambda event: event.start_ns)), 1)
