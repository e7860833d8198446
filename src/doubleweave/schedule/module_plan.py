"""The plan of a run of a module for given sizes: three passes over plain data.

`inline` lays the calls out flat, `cut_calls` makes steps of them, `place_tensors` gives each tensor its memory.
A plan is made at the first call of each new size and kept. Nothing here knows of threads or ExecuTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

from doubleweave.ir.split import Function, Split
from doubleweave.schedule.cut_calls import cut_calls
from doubleweave.schedule.inline_functions import inline
from doubleweave.schedule.module_steps import Plan
from doubleweave.schedule.place_tensors import place_tensors


def make(split: Split, function: Function, name: str, found: Sequence[tuple[str, Sequence[int]]]) -> Plan:
    """Plan a run of `function` for inputs of these dtypes and shapes; InputError where they do not fit."""
    flat = inline(split, function, name, found)
    tensors, steps, outputs = cut_calls(flat)
    placed, buffer_bytes = place_tensors(tensors, steps)
    return Plan(
        function=function.name,
        tensors=placed,
        steps=tuple(steps),
        inputs=tuple(range(len(function.inputs))),  # they are the first tensors
        outputs=outputs,
        updates=flat.updates,
        buffer_bytes=buffer_bytes,
    )
