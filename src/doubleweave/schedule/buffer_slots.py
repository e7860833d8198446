"""Which values of a chunk share memory: a slot is free again after its value's last reader.

Slots are the same for every chunk, so that a chunk's buffers are its lane's copy of them. It knows nothing of
tasks, chunks or bytes of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from doubleweave.ir.split import Split


@dataclass(frozen=True)
class Slots:
    """`of[value]` is its slot; `values[slot]` what lies there, in order; `row_bytes[slot]` of one row.

    Outputs share with nobody: `outputs` lists them.
    """

    of: dict[str, int]
    values: tuple[tuple[str, ...], ...]
    row_bytes: tuple[int, ...]
    outputs: tuple[str, ...]


def assign(split: Split) -> Slots:
    """Give each value that lives for a chunk a slot; equal rows share."""
    values = {value.name: value for value in split.values}
    last_use = {name: i for i, call in enumerate(split.calls) for name in (*call.reads, *call.writes)}
    of: dict[str, int] = {}
    held: list[list[str]] = []
    row_bytes: list[int] = []
    free: dict[int, list[int]] = {}
    for index, call in enumerate(split.calls):
        for name in call.writes:
            if values[name].kind != "chunk":
                continue
            size = values[name].row_bytes
            if shared := free.get(size):
                of[name] = shared.pop(0)
                held[of[name]].append(name)
            else:
                of[name] = len(held)
                held.append([name])
                row_bytes.append(size)
        for name in dict.fromkeys((*call.reads, *call.writes)):
            if name in of and last_use[name] == index:
                free.setdefault(values[name].row_bytes, []).append(of[name])
    outputs = tuple(value.name for value in split.values if value.kind == "output")
    return Slots(of, tuple(map(tuple, held)), tuple(row_bytes), outputs)


def users(split: Split) -> dict[str, tuple[int, ...]]:
    """The calls that touch each value, its writer first."""
    found: dict[str, list[int]] = {}
    for index, call in enumerate(split.calls):
        for name in dict.fromkeys((*call.writes, *call.reads)):
            found.setdefault(name, []).append(index)
    return {name: tuple(calls) for name, calls in found.items()}
