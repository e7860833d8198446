"""Run a language model's split in eager torch, chunk behind chunk: the numeric reference of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from doubleweave.compiler.split.pieces import SegmentModules, TorchSplit
from doubleweave.errors import InputError
from doubleweave.ir.split import CACHED, ROWS, Call, Port, Segment

# Called with a call, the tensors that it read, and those that it wrote.
OnCall = Callable[[Call, Sequence[Tensor], Sequence[Tensor]], None]


def run_eager(
    torch_split: TorchSplit, input_ids: Tensor, chunk: int | None = None, *, long: bool = False
) -> Tensor:
    """Run the split in eager torch, chunk behind chunk, with a growing cache: the numeric reference.

    input_ids int64 [1, T] -> logits float32 [1, T, vocab]. `chunk` None takes the prompt in one piece. `long`:
    a text behind LongRoPE's border.
    Raises InputError for a batch larger than 1.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(
            f"input_ids has shape {list(input_ids.shape)}: expected [1, T]; the cache holds the tokens of one "
            "sequence, so run a batch as several sessions"
        )
    chunks = torch.split(input_ids, chunk or input_ids.shape[1], dim=1)
    return torch.cat(list(run_chunks(torch_split, chunks, long=long)), dim=1)


def run_chunks(
    torch_split: TorchSplit,
    chunks: Iterable[Tensor],
    modules: Mapping[str, Callable[..., Any]] | None = None,
    *,
    cached: Mapping[str, Tensor] | None = None,
    long: bool = False,
    on_call: OnCall | None = None,
) -> Iterator[Tensor]:
    """Yield the logits [1, T, vocab] of each chunk (token ids int64 [1, T]) of one sequence.

    `modules` are the segments to run, by name, in place of the split's own. The chunks come behind the rows
    of `cached`: [1, rows, …] for each value of the cache. `long`: of a text behind LongRoPE's border.
    `on_call` gets every call with what it read and wrote.
    """
    run = modules or SegmentModules(torch_split)
    kinds = {value.name: value.kind for value in torch_split.split.values}
    output = next(name for name, kind in kinds.items() if kind == "output")
    cache = dict(cached or {})
    states = {
        value.name: cache.pop(value.name, torch.zeros(tuple(map(int, value.shape))))
        for value in torch_split.split.values
        if value.kind == "state"
    }
    start = next((rows.shape[1] for rows in cache.values()), 0)
    for input_ids in chunks:
        end = start + input_ids.shape[1]
        positions = torch.arange(start, end)[None]
        env = {"input_ids": input_ids, "position_ids": ~positions if long else positions, **states}
        env |= torch_split.encoded
        start = end
        for call in torch_split.split.calls:
            segment = torch_split.split.segment(call.segment)
            ports = segment.inputs
            read = [
                _cached(cache.get(name), port) if kinds[name] == "cache" else env[name]
                for name, port in zip(call.reads, ports, strict=True)
            ]
            with torch.no_grad():
                if segment.each_row:
                    written = row_by_row(run[call.segment], call, segment, read)
                else:
                    written = run[call.segment](*read)
            if on_call is not None:
                on_call(call, read, written)
            for name, result in zip(call.writes, written, strict=True):
                if kinds[name] == "cache":
                    # Copies the cache at every chunk: this is the reference for numbers, not for speed.
                    cache[name] = torch.cat((cache[name], result), 1) if name in cache else result
                elif kinds[name] == "state":
                    states[name] = result
                else:
                    env[name] = result
        yield env[output]


def row_by_row(
    run: Callable[..., Any], call: Call, segment: Segment, read: Sequence[Tensor]
) -> Sequence[Tensor]:
    """What a recurrence writes over a chunk: rows together, and each state as the last row leaves it."""
    axes = [port.shape.index(ROWS) if ROWS in port.shape else None for port in segment.inputs]
    now = list(read)
    parts = []
    for row in range(next(t.shape[axis] for t, axis in zip(read, axes, strict=True) if axis is not None)):
        given = (t if a is None else t.narrow(a, row, 1) for t, a in zip(now, axes, strict=True))
        parts.append(run(*given))
        for name, result in zip(call.writes, parts[-1], strict=True):
            if name in call.reads:
                now[call.reads.index(name)] = result
    ports = zip(segment.outputs, zip(*parts, strict=True), strict=True)
    return [
        torch.cat(rows, port.shape.index(ROWS)) if ROWS in port.shape else rows[-1] for port, rows in ports
    ]


def _cached(rows: Tensor | None, port: Port) -> Tensor:
    """The rows so far, or, for a call over a cache of fixed length, these rows with zeros behind them."""
    if CACHED in port.shape:
        assert rows is not None
        return rows
    whole = torch.zeros([int(size) for size in port.shape], dtype=getattr(torch, port.dtype))
    if rows is not None:
        whole[:, : rows.shape[1]] = rows
    return whole
