"""Show that the rows of a segment do not depend on one another, so that it may run chunk by chunk.

First from the graph: the axis of the rows is followed through every operator, and an operator that mixes rows, or
that is not known to keep them apart, is refused. Then in numbers: the segment over all rows at once against the same
rows chunk by chunk, the last chunk padded. A segment with state is checked in numbers alone, in order and never padded,
because a row is meant to reach the rows behind it through the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, product

import torch
from torch import Tensor, fx

from doubleweave.compiler.split.row_rules import Axis, Follower, MixesRows, UnknownOperator
from doubleweave.errors import SplitError
from doubleweave.ir.sizes import shape_of
from doubleweave.ir.split import ROWS, Port

PROVEN = "shown from the graph, and checked in numbers"
CHECKED = "checked in numbers"
_TOLERANCE = 1e-4  # relative: kernels add up in another order at another number of rows


@dataclass(frozen=True)
class Graph:
    """A segment that is to run chunk by chunk.

    `are_states` and `are_updates` mark the inputs and outputs that are a state before and after.
    """

    graph_module: fx.GraphModule
    inputs: Sequence[Port]
    outputs: Sequence[Port]
    are_states: Sequence[bool]
    are_updates: Sequence[bool]


def check(name: str, graph: Graph, sizes: Sequence[int]) -> str:
    """PROVEN or CHECKED; raises SplitError where rows are not independent."""
    for port, is_update in zip(graph.outputs, graph.are_updates, strict=True):
        if port.shape.count(ROWS) != 1 and not is_update:
            raise SplitError(
                f"{name!r}: its result {port.name} has shape {list(port.shape)}, expected one axis of {ROWS} rows, as "
                "many as go in: it cannot run chunk by chunk; make it Dynamic"
            )
    has_state = any(graph.are_states) or any(graph.are_updates)
    if has_state:
        if 1 not in sizes:
            raise SplitError(
                f"{name!r}: has state, which padding must not reach, so that chunks must add up exactly: expected 1 "
                f"among its sizes, found {', '.join(map(str, sizes))}"
            )
    else:
        _prove(name, graph)
    problem = _compare(graph, sizes)
    if problem is not None:
        raise SplitError(
            f"{name!r}: chunk by chunk it gives other numbers than at once ({problem}): its rows depend on one "
            "another; make it Dynamic"
        )
    return CHECKED if has_state else PROVEN


def _prove(name: str, graph: Graph) -> None:
    rows: dict[fx.Node, Axis] = {}
    nodes = graph.graph_module.graph.nodes
    for node, port in zip((n for n in nodes if n.op == "placeholder"), graph.inputs, strict=True):
        rows[node] = port.shape.index(ROWS) if ROWS in port.shape else None
    symbol = next(node.meta["val"].shape[axis].node.expr for node, axis in rows.items() if axis is not None)
    follow = Follower(rows, symbol)
    try:
        for node in nodes:
            if node.op == "get_attr":
                rows[node] = None
            elif node.op == "call_function":
                follow.node(node)
    except UnknownOperator as error:
        raise SplitError(
            f"{name!r}: cannot show that its rows are independent (they are not followed through {error}), so it "
            "cannot run chunk by chunk; make it Dynamic"
        ) from None
    except MixesRows as error:
        raise SplitError(
            f"{name!r}: its rows depend on one another ({error}), so it cannot be cut there; cut another axis, or make "
            "it Dynamic"
        ) from None


def _compare(graph: Graph, sizes: Sequence[int]) -> str | None:
    """The first difference between all rows at once and chunk by chunk, None where there is none."""
    generator = torch.Generator().manual_seed(20261)
    # Numbers of a usual size; large ones; and large ones in the last row alone: a branch or scale that a single row
    # decides must not show in other rows.
    for size, (scale, of_last) in product(sizes, ((1, 1), (100, 1), (1, 1000))):
        # A full chunk, and one that is padded or, with state, single rows.
        total = size + max(1, size // 2)
        whole = [_numbers(port, total, generator, scale, of_last) for port in graph.inputs]
        chunks = [size, *([1] * (total - size) if any(graph.are_states) else [size])]
        try:
            with torch.no_grad():
                wanted = graph.graph_module(*whole)
                found = _chunk_by_chunk(graph, whole, total, chunks)
        except Exception as error:
            return f"it cannot be tried: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        for port, a, b in zip(graph.outputs, wanted, found, strict=True):
            largest = float(a.abs().max()) if a.is_floating_point() and a.numel() else 0.0
            difference = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
            if not difference <= _TOLERANCE * max(1.0, largest):
                return f"{port.name} by {difference:.2g} with {total} rows in chunks of {size}"
    return None


def _numbers(port: Port, rows: int, generator: torch.Generator, scale: int, of_last: int) -> Tensor:
    """Random numbers times `scale`, those of the last row also times `of_last`."""
    shape = shape_of(port.shape, {ROWS: rows})
    dtype = getattr(torch, port.dtype)
    if not dtype.is_floating_point:
        # Small, because they may be indices.
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    tensor = torch.randn(shape, generator=generator).to(dtype) * scale
    if ROWS in port.shape:
        tensor.select(port.shape.index(ROWS), -1).mul_(of_last)
    return tensor


def _chunk_by_chunk(graph: Graph, whole: Sequence[Tensor], total: int, chunks: Sequence[int]) -> list[Tensor]:
    """The results over `total` rows, run in these chunks; a state's is that of the last chunk."""
    states = list(compress(whole, graph.are_states))
    ports = zip(graph.outputs, graph.are_updates, strict=True)
    axes = [None if is_update else port.shape.index(ROWS) for port, is_update in ports]
    parts: list[list[Tensor]] = [[] for _ in axes]
    start = 0
    for size in chunks:
        given = iter(states)
        args = [
            next(given) if is_state else _chunk(tensor, port, start, size)
            for tensor, port, is_state in zip(whole, graph.inputs, graph.are_states, strict=True)
        ]
        results = graph.graph_module(*args)
        states = list(compress(results, graph.are_updates))
        rows = min(size, total - start)
        for part, result, axis in zip(parts, results, axes, strict=True):
            part.append(result if axis is None else result.narrow(axis, 0, rows))
        start += size
    return [
        part[-1] if axis is None else torch.cat(part, axis) for part, axis in zip(parts, axes, strict=True)
    ]


def _chunk(tensor: Tensor, port: Port, start: int, size: int) -> Tensor:
    """`size` rows from `start`, with zeros behind the last row."""
    if ROWS not in port.shape:
        return tensor
    axis = port.shape.index(ROWS)
    rows = tensor.narrow(axis, start, min(size, tensor.shape[axis] - start))
    behind = [0, 0] * (rows.ndim - axis)
    behind[-1] = size - rows.shape[axis]
    return torch.nn.functional.pad(rows, behind)
