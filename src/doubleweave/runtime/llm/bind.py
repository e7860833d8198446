"""Bind a scheduled task graph to memory and loaded methods: what the native executor replays.

It knows nothing of prompts or sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from doubleweave import _native
from doubleweave.errors import ScheduleError
from doubleweave.ir.split import FixedSizes, Port
from doubleweave.runtime.instances import Instances
from doubleweave.runtime.native_errors import as_run_errors
from doubleweave.schedule.pattern import has_instance_per_worker
from doubleweave.schedule.task_graph import Task
from doubleweave.schedule.verify import Verified

Regions = Sequence[_native.Region]
NamedRegions = Mapping[str, _native.Region]


class Binder:
    """Builds one native Execution from a verified schedule, memory and instances."""

    def __init__(
        self,
        verified: Verified,
        buffers: Regions,
        named: NamedRegions,
        instances: Instances,
        all_rows: bool,
        encoded_rows: int,
    ) -> None:
        self.encoded_rows = encoded_rows
        self.verified = verified
        self.graph = verified.graph
        self.all_rows = all_rows
        self.instances = instances
        self.segments = {segment.name: segment for segment in self.graph.split.segments}
        self.values = {value.name: value for value in self.graph.split.values}
        self.regions = [*buffers, *named.values()]
        self.region_of = {name: len(buffers) + i for i, name in enumerate(named)}
        self.used: dict[tuple[str, int], int] = {}
        self.loaded: list[_native.Instance] = []

    def build(self) -> _native.Execution:
        self.instances.load_all([self._method(task)[0] for task in self.graph.tasks])
        schedule, workers = self.verified.schedule, self.verified.workers
        tasks = [self._task(number, schedule.worker_of[number]) for number in range(len(self.graph))]
        with as_run_errors():  # sizes and dtypes: the methods say which they take
            return _native.Execution(self.loaded, self.regions, tasks, workers, schedule.threads)

    def _method(self, task: Task) -> tuple[str, int, int]:
        """The method that a task runs, and the rows of the chunk that it computes: (method, first row, number)."""
        call, chunk = self.graph.split.calls[task.call], self.graph.chunks[task.chunk]
        segment = self.segments[call.segment]
        if segment.each_row:
            return f"{call.segment}@1", 0, 1
        static = isinstance(segment.shape, FixedSizes)
        first, rows = 0, chunk.compiled_size if static else chunk.num_tokens
        if call.rows == "last" and not self.all_rows:
            first, rows = chunk.num_tokens - 1, 1
        return f"{call.segment}@{rows}" if static else call.segment, first, rows

    def _task(self, number: int, worker: int) -> _native.Task:
        task = self.graph.tasks[number]
        call = self.graph.split.calls[task.call]
        segment = self.segments[call.segment]
        method, first, rows = self._method(task)
        # A method without weights is cheap to load: a copy for each worker lets chunks attend at the same time.
        copy = worker if has_instance_per_worker(self.graph.split, task.call) else 0
        return _native.Task(
            self._instance(method, copy),
            [
                self._binding(name, port, task.chunk, rows, first, segment.each_row, 0)
                for name, port in zip(call.reads, segment.inputs, strict=True)
            ],
            [
                self._binding(name, port, task.chunk, rows, 0, segment.each_row, 1)
                for name, port in zip(call.writes, segment.outputs, strict=True)
            ],
            list(self.verified.after[number]),
            number,
            self.graph.chunks[task.chunk].num_tokens if segment.each_row else 1,
        )

    def _instance(self, method: str, copy: int) -> int:
        """The number of the instance in this execution."""
        key = (method, copy)
        if key not in self.used:
            self.used[key] = len(self.loaded)
            self.loaded.append(self.instances.get(method, copy))
        return self.used[key]

    def _binding(
        self, name: str, port: Port, chunk_index: int, rows: int, first: int, each_row: bool, writes: int
    ) -> _native.Binding:
        value, chunk = self.values[name], self.graph.chunks[chunk_index]
        cached = chunk.start + chunk.num_tokens
        if value.kind == "encoded":
            sizes = [self.encoded_rows if s == "E" else int(s) for s in port.shape]
            return _native.Binding(self.region_of[name], sizes)
        sizes = [rows if s == "T" else cached if s == "S" else int(s) for s in port.shape]
        per_row = value.row_bytes if each_row else 0
        if value.kind == "state":
            # Two copies that swap: the token at position p reads copy p % 2.
            return _native.Binding(
                self.region_of[name],
                sizes,
                copy_bytes=value.row_bytes,
                first_copy=(chunk.start + writes) % 2,
            )
        if value.kind not in ("input", "cache"):
            buffer = self.graph.buffer(name, chunk_index)
            return _native.Binding(buffer, sizes, first * value.row_bytes, offset_per_row=per_row)
        region = self.region_of[name]
        if "S" in port.shape:
            # The cached length is known when the run starts: the executor adds it to this dim.
            return _native.Binding(region, sizes, 0, 0, port.shape.index("S"))
        if "T" not in port.shape:  # the whole cache
            return _native.Binding(region, sizes)
        # Token ids, or rows in their place, are this run's own; positions and cache rows go on behind cached tokens.
        moves = value.row_bytes if value.kind == "cache" or name == "position_ids" else 0
        offset = (chunk.start + first) * value.row_bytes
        return _native.Binding(region, sizes, offset, moves, offset_per_row=per_row)


def bind(
    verified: Verified,
    buffers: Regions,
    named: NamedRegions,
    instances: Instances,
    *,
    all_rows: bool,
    encoded_rows: int = 0,
) -> _native.Execution:
    """Build the native execution over the buffers of the graph and the regions of inputs and cache entries by name.
    `all_rows`: the head computes every row, not just the last one. `encoded_rows` are those that an encoder gave.

    Raises ScheduleError for a schedule that did not go through `verify`, RunError where it does not fit the methods.
    """
    if not isinstance(verified, Verified):
        raise ScheduleError(
            f"schedule: found a {type(verified).__name__}, expected what verify gives; verify it first"
        )
    return Binder(verified, buffers, named, instances, all_rows, encoded_rows).build()
