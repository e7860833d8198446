"""Buffer slots: which values of a chunk share memory. A slot is free again after its value's last reader.

Slots are the same for every chunk, so a chunk's buffers are its lane's copy of them. They follow from the split alone,
so run.json has them ready. This file knows nothing of tasks or chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from doubleweave.ir.split import Split


@dataclass(frozen=True)
class Slots:
    """`of[value]` is the slot of a value, `values[slot]` the values that lie there one after the other, and
    `row_bytes[slot]` the bytes of one row. `outputs` lists the outputs, which have no slots: their caller reads them
    after the run."""

    of: dict[str, int]
    values: tuple[tuple[str, ...], ...]
    row_bytes: tuple[int, ...]
    outputs: tuple[str, ...]


def assign(split: Split) -> Slots:
    """Give each value that lives for a chunk a slot.

    Only values of equal rows share: few sizes occur in a model, and no slot is larger than its values. SmolLM2's thirty
    layers take four slots of 288 KiB and two of 32 KiB for chunks of 128 tokens.
    """
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
                # The slot that has been free the longest: fewer tasks have to wait for each other.
                of[name] = shared.pop(0)
                held[of[name]].append(name)
            else:
                of[name] = len(held)
                held.append([name])
                row_bytes.append(size)
        # Values that a call writes are placed before its reads are freed: a method may write before it has read all.
        for name in dict.fromkeys((*call.reads, *call.writes)):
            if name in of and last_use[name] == index:
                free.setdefault(values[name].row_bytes, []).append(of[name])
    outputs = tuple(value.name for value in split.values if value.kind == "output")
    return Slots(of, tuple(map(tuple, held)), tuple(row_bytes), outputs)


def users(split: Split) -> dict[str, tuple[int, ...]]:
    """The places of the calls that touch each value, its writer's first."""
    found: dict[str, list[int]] = {}
    for index, call in enumerate(split.calls):
        for name in dict.fromkeys((*call.writes, *call.reads)):
            found.setdefault(name, []).append(index)
    return {name: tuple(calls) for name, calls in found.items()}
