"""The memory of a run, value by value: who writes it, who reads it, how many bytes, when it is freed.

For `inspect --memory` and docs/memory.md. Everything is read off the plan that a run follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from doubleweave.errors import InputError
from doubleweave.ir.manifest import Manifest
from doubleweave.ir.sizes import evaluate
from doubleweave.schedule import module_plan
from doubleweave.schedule.choice import chunk_shape
from doubleweave.schedule.chunks import cut
from doubleweave.schedule.module_steps import Plan, most_at_once
from doubleweave.schedule.symbols import sizes_of
from doubleweave.schedule.task_graph import TaskGraph, build
from doubleweave.tables import format_table

_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """One value. `owner` says whose memory it is in: "caller", "session", or "run, buffer 3"."""

    value: str
    owner: str
    num_bytes: int
    writer: str
    readers: tuple[str, ...]
    freed: str


@dataclass(frozen=True)
class Memory:
    """Rows in the order of their writers. `buffer_bytes` are the bytes of the run's buffers. `peak_bytes` are
    the most bytes that hold values at one time: a lower bound of every plan."""

    rows: tuple[Row, ...]
    buffer_bytes: int
    peak_bytes: int


def memory_of(manifest: Manifest, num_tokens: int | None, sizes: dict[str, int]) -> Memory:
    """The memory of a prefill of `num_tokens`, or of a module's run with these sizes of its symbols.

    Raises InputError for a number out of range, or of the other kind of program.
    """
    if manifest.model is not None:
        if sizes:
            raise InputError("size: this is a language model; give --prompt-len")
        most = manifest.model.max_context
        tokens = min(_PROMPT_TOKENS, most) if num_tokens is None else num_tokens
        if not 1 <= tokens <= most:
            raise InputError(f"prompt-len: found {tokens}, expected 1 to {most}")
        return of_tasks(build(manifest.split, cut(tokens, chunk_shape(manifest.split)), "last"))
    main = manifest.split.main
    if num_tokens is not None:
        raise InputError("prompt-len: this is no language model; give --size SYMBOL=N")
    known = {r.symbol: r.high for r in main.ranges}
    for symbol, number in sizes.items():
        found = next((r for r in main.ranges if r.symbol == symbol), None)
        if found is None:
            names = ", ".join(known) or "(none)"
            raise InputError(f"size: found dim {symbol!r}, expected one of this program's: {names}")
        if not evaluate(found.low, known) <= number <= found.high:
            raise InputError(f"size: found {symbol} = {number}, expected {found.low} to {found.high}")
        known[symbol] = number
    inputs = [(value.dtype, sizes_of(value, known, manifest.name)) for value in main.inputs]
    return of_plan(module_plan.make(manifest.split, main, manifest.name, inputs))


def of_plan(plan: Plan) -> Memory:
    """The memory of a module's run."""
    names = [
        step.name + (f"/{step.chunk}" if step.chunk else "") + ("" if step.copy is None else " (copy)")
        for step in plan.steps
    ]
    owners = {"input": "caller", "output": "caller", "state": "session"}
    rows = []
    for index, tensor in enumerate(plan.tensors):
        last = plan.last_use(index)
        if last is None:
            continue
        is_buffer = tensor.place == "buffer"
        rows.append(
            Row(
                value=tensor.name + (f" ({tensor.number})" if tensor.place == "state" else ""),
                owner=f"run, buffer {tensor.number}" if is_buffer else owners[tensor.place],
                num_bytes=tensor.num_bytes,
                writer=names[tensor.writers[0]] if tensor.writers else tensor.place,
                readers=tuple(names[reader] for reader in sorted(set(tensor.readers))),
                freed=f"after {names[last]}" if is_buffer else f"by the {owners[tensor.place]}",
            )
        )
    return Memory(tuple(rows), sum(plan.buffer_bytes), plan.peak_bytes())


def of_tasks(graph: TaskGraph) -> Memory:
    """The memory of a language model's prefill, chunk behind chunk; the cache apart, which grows by the token."""
    split = graph.split
    values = {value.name: value for value in split.values}
    readers: dict[tuple[str, int], list[int]] = {}
    for index, task in enumerate(graph.tasks):
        for name in split.calls[task.call].reads:
            readers.setdefault((name, task.chunk), []).append(index)
    rows, spans = [], []
    for index, task in enumerate(graph.tasks):
        call = split.calls[task.call]
        chunk = graph.chunks[task.chunk]
        for name in call.writes:
            value = values[name]
            reading = readers.get((name, task.chunk), [])
            names = tuple(map(graph.name, reading))
            count = (1 if call.rows == "last" else chunk.num_tokens) * value.row_bytes
            if value.kind == "state":
                owner, freed, count = "session, state", "by reset", value.row_bytes
            elif value.kind == "cache":
                owner, freed = "session, cache", "by truncate or reset"
                names += ("attention of later chunks",)
            else:
                owner = f"run, buffer {graph.buffer(name, task.chunk)}"
                is_output = value.kind == "output"
                freed = "by the session" if is_output else f"after {graph.name(max(reading, default=index))}"
                spans.append((index, max(reading, default=len(graph.tasks)), count))
            rows.append(Row(f"{name}/{task.chunk}", owner, count, graph.name(index), names, freed))
    return Memory(tuple(rows), sum(graph.buffer_bytes), most_at_once(spans))


def table(memory: Memory) -> str:
    """One row a value, and the totals."""
    rows = [["value", "owner", "bytes", "written by", "read by", "freed"]]
    rows += [
        [row.value, row.owner, str(row.num_bytes), row.writer, _short(row.readers), row.freed]
        for row in memory.rows
    ]
    return (
        format_table(rows)
        + f"\nbuffers of the run: {memory.buffer_bytes} bytes; the most in use at one time: {memory.peak_bytes} bytes"
    )


def _short(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, … {len(names) - 1} more"
