"""What a piece of a graph does to the features of a head: the matrix, found by evaluation, as a turn of pairs.

For tables of random numbers every entry of the matrix of a rotary embedding is 0, 1 or a number of a table with a sign,
so its place in the matrix says how the piece is written: which features are pairs, and where their angles stand in the
tables. This module knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Column(NamedTuple):
    """A column of a table, or its negative."""

    table: int
    column: int
    sign: int


class Turn(NamedTuple):
    """y[outputs] = turn(x[inputs]), where turn is the half rotation of the first `len(cos)` features of a head.

    `inputs` and `outputs` name a feature for each feature of the kernel; `cos` and `sin` a column for each that turns.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    cos: tuple[Column, ...]
    sin: tuple[Column, ...]


def turn_of(matrix: Tensor, tables: Sequence[Tensor]) -> Turn | None:
    """`matrix` [D, D] takes a head's features to its results under `tables` of one row; None if it turns no pairs."""
    rows = [[(int(at), float(row[at])) for at in row.nonzero()[:, 0]] for row in matrix]
    passed = [(entries[0][0], out) for out, entries in enumerate(rows) if len(entries) == 1]
    if not all(rows[out][0][1] == 1.0 for _, out in passed):
        return None
    pairs = _pairs(rows)
    if not pairs or 2 * len(pairs) + len(passed) != len(rows):
        return None
    entries: list[list[Column]] = [[], [], [], []]  # of the half rotation: cos of both halves, then sin
    for (first, second), (out, other) in pairs:
        numbers = dict(rows[out]), dict(rows[other])
        wanted = numbers[0][first], numbers[1][second], -numbers[0][second], numbers[1][first]
        for found, number in zip(entries, wanted, strict=True):
            if (column := _column(number, tables)) is None:
                return None
            found.append(column)
    inputs = [pair[0][half] for half in (0, 1) for pair in pairs] + [source for source, _ in passed]
    outputs = [pair[1][half] for half in (0, 1) for pair in pairs] + [out for _, out in passed]
    if sorted(inputs) != list(range(len(rows))) or sorted(outputs) != list(range(len(rows))):
        return None
    cos, sin = entries[0] + entries[1], entries[2] + entries[3]
    return Turn(tuple(inputs), tuple(outputs), tuple(cos), tuple(sin))


def _pairs(rows: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(the two inputs, the two results) of each pair, in the order of the first result."""
    results: dict[tuple[int, ...], list[int]] = {}
    for out, entries in enumerate(rows):
        if len(entries) == 2:
            results.setdefault((entries[0][0], entries[1][0]), []).append(out)
    found = []
    for inputs, outs in results.items():
        if len(outs) != 2:
            return []
        found.append(((inputs[0], inputs[1]), (outs[0], outs[1])))
    return found


def _column(number: float, tables: Sequence[Tensor]) -> Column | None:
    for index, table in enumerate(tables):
        for sign in (1, -1):
            if len(places := (table == sign * number).nonzero()):
                return Column(index, int(places[0][0]), sign)
    return None


def natural(order: Sequence[int]) -> bool:
    return list(order) == list(range(len(order)))


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.argsort(torch.tensor(order)).tolist())
