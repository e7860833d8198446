"""The task graph of a run: which calls are needed for which chunks, and what each waits for.

Tasks nobody needs are never listed: they are found by walking back from what is asked for. Buffers are
assigned here too, because reusing one is a dependency. It knows nothing of workers, threads or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from doubleweave import scratch
from doubleweave.chunks import Chunk
from doubleweave.ir import Dynamic, Split

Want = Literal["last", "all"]


class Task(NamedTuple):
    """One call for one chunk; the unit a schedule places. Its text form is "call/chunk"."""

    call: int
    chunk: int


@dataclass(frozen=True)
class TaskGraph:
    """Tasks chunk behind chunk, which is an order that can run when one chunk is in flight.

    `after[i]` lists what task i waits for. `buffers` maps (value, chunk) to a buffer number; buffer b has
    `buffer_bytes[b]` bytes.
    """

    split: Split
    chunks: tuple[Chunk, ...]
    tasks: tuple[Task, ...]
    after: tuple[tuple[int, ...], ...]
    buffers: dict[tuple[str, int], int]
    buffer_bytes: tuple[int, ...]

    def name(self, index: int) -> str:
        task = self.tasks[index]
        return f"{self.split.calls[task.call].name}/{task.chunk}"


def needed(split: Split, chunks: Sequence[Chunk], want: Want) -> tuple[Task, ...]:
    """Walk back from the outputs of the last chunk ("last") or of every chunk ("all")."""
    writer = split.writer()
    kinds = {value.name: value.kind for value in split.values}
    last = len(chunks) - 1
    stack = [
        Task(writer[value.name], chunk)
        for value in split.values
        if value.kind == "output"
        for chunk in (range(len(chunks)) if want == "all" else (last,))
    ]
    found: set[Task] = set()
    while stack:
        task = stack.pop()
        if task in found:
            continue
        found.add(task)
        for name in split.calls[task.call].reads:
            if kinds[name] == "cache":
                stack += [Task(writer[name], chunk) for chunk in range(task.chunk + 1)]
            elif name in writer:
                stack.append(Task(writer[name], task.chunk))
    # A later turn reads the cache of every token, the last chunk's included.
    cached = [
        Task(writer[v.name], chunk) for v in split.values if v.kind == "cache" for chunk in range(last + 1)
    ]
    assert found.issuperset(cached)
    return tuple(sorted(found, key=lambda task: (task.chunk, task.call)))


def build(split: Split, chunks: tuple[Chunk, ...], want: Want, in_flight: int = 1) -> TaskGraph:
    """Build the task graph with buffers for `in_flight` chunks at once; chunk c follows c - in_flight."""
    tasks = needed(split, chunks, want)
    index = {task: number for number, task in enumerate(tasks)}
    writer = split.writer()
    values = {value.name: value for value in split.values}
    most_rows = max(chunk.compiled_size for chunk in chunks)
    pool = _BufferPool(in_flight)
    last_read = _last_reads(split, tasks)
    after: list[tuple[int, ...]] = []
    buffers: dict[tuple[str, int], int] = {}
    for number, task in enumerate(tasks):
        call = split.calls[task.call]
        waits: set[int] = set()
        for name in call.reads:
            if values[name].kind == "cache":
                waits |= {index[Task(writer[name], chunk)] for chunk in range(task.chunk + 1)}
            elif name in writer:
                waits.add(index[Task(writer[name], task.chunk)])
        # One method is one instance (attention apart): its calls run one behind the other, which also
        # appends a layer's chunks in order.
        before = Task(task.call, task.chunk - 1)
        if before in index and not has_instance_per_worker(split, task.call):
            waits.add(index[before])
        for name in call.writes:
            if values[name].kind == "cache":
                continue
            keep = values[name].kind == "output"
            rows = 1 if call.rows == "last" and want == "last" else most_rows
            buffer, free_after = pool.take(task.chunk, values[name].row_bytes, rows, keep)
            waits |= free_after
            buffers[name, task.chunk] = buffer
            pool.use(buffer, number)
        for name in call.reads:
            if (name, task.chunk) in buffers:
                pool.use(buffers[name, task.chunk], number)
        for name in (*call.reads, *call.writes):
            if last_read.get((name, task.chunk)) == number and values[name].kind == "chunk":
                pool.release(task.chunk, buffers[name, task.chunk])
        after.append(tuple(sorted(_direct(waits, after))))
    spaced = _keep_close(split, index, after, len(chunks), in_flight)
    return TaskGraph(split, chunks, tasks, spaced, buffers, tuple(pool.sizes))


def _keep_close(
    split: Split, index: dict[Task, int], after: list[tuple[int, ...]], num_chunks: int, in_flight: int
) -> tuple[tuple[int, ...], ...]:
    """Let no chunk run so far ahead of those in flight that two meet in one group of scratch memory.

    Chunks run in rounds of `in_flight`; within a round none is a whole number of groups ahead of the last,
    and a round starts no earlier than that behind the last chunk of the round before.
    """
    order, span = scratch.blocks(split), scratch.num_groups(split) - 1
    result = list(after)
    if not 1 < in_flight <= (span + 1) // 2:
        return tuple(result)
    for chunk in range(num_chunks):
        last = min((chunk // in_flight + 1) * in_flight, num_chunks) - 1
        for place, call in enumerate(order):
            behind = place - span
            if behind >= 0 and chunk != last:
                other = Task(order[behind], last)
            elif behind < 0 and chunk >= in_flight:
                other = Task(order[behind], chunk // in_flight * in_flight - 1)
            else:
                continue
            number = index[Task(call, chunk)]
            result[number] = (*result[number], index[other])
    return tuple(result)


def has_instance_per_worker(split: Split, call: int) -> bool:
    """Whether each worker has its own instance: dynamic segments without weights (attention)."""
    segment = split.segment(split.calls[call].segment)
    return isinstance(segment.shape, Dynamic) and segment.weight_bytes == 0


def _last_reads(split: Split, tasks: Sequence[Task]) -> dict[tuple[str, int], int]:
    """The last task, in the listed order, that touches each (value, chunk)."""
    return {
        (name, task.chunk): number
        for number, task in enumerate(tasks)
        for name in (*split.calls[task.call].reads, *split.calls[task.call].writes)
    }


def _direct(waits: set[int], after: Sequence[tuple[int, ...]]) -> set[int]:
    """Drop dependencies that a direct one implies (one step back is enough to keep lists short)."""
    implied = {earlier for number in waits for earlier in after[number]}
    return waits - implied


class _BufferPool:
    """Buffers by lane and row size; a buffer's next writer waits for everyone who used it before."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.sizes: list[int] = []
        self.users: list[set[int]] = []
        self.row_bytes: list[int] = []
        self.free: dict[tuple[int, int], list[int]] = {}

    def take(self, chunk: int, row_bytes: int, rows: int, keep: bool) -> tuple[int, set[int]]:
        """A buffer for the chunk's lane, and the tasks to wait for. `keep`: it is never reused."""
        free = self.free.setdefault((chunk % self.lanes, row_bytes), [])
        if free and not keep:
            buffer = free.pop(0)
            waits, self.users[buffer] = self.users[buffer], set()
            return buffer, waits
        self.sizes.append(rows * row_bytes)
        self.row_bytes.append(row_bytes)
        self.users.append(set())
        return len(self.sizes) - 1, set()

    def use(self, buffer: int, task: int) -> None:
        self.users[buffer].add(task)

    def release(self, chunk: int, buffer: int) -> None:
        self.free[chunk % self.lanes, self.row_bytes[buffer]].append(buffer)
