"""Every segment of a large program against the float32 split, on a few rows: whether each has its own weights.

One method is loaded at a time, and one segment's weights are read at a time: neither is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from doubleweave.check.language_model import Compiled, refusal, token_ids
from doubleweave.check.segments import SEGMENT_BOUND, Comparison
from doubleweave.compiler.program_folder import Progress
from doubleweave.compiler.split.cache_format import in_format
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import weight_bytes
from doubleweave.ir.manifest import Manifest
from doubleweave.ir.split import Call, FixedSizes
from doubleweave.runtime.llm.program import Program
from doubleweave.schedule.choice import chunk_shape

# Four bits add a noise of some 0.15 to a segment of random weights; another layer's weights make it 1.4.
WEIGHTS_BOUND = 0.5
_ROWS = 8


def hold_weights(compiled: Compiled, manifest: Manifest, report: Progress) -> float:
    """The largest noise of a segment of the program against float32; CheckError where one has other weights."""
    shape = chunk_shape(compiled.lowered.split)
    rows = min(shape.sizes) if isinstance(shape, FixedSizes) else _ROWS
    bound = SEGMENT_BOUND if compiled.is_float else WEIGHTS_BOUND
    compared = Comparison(compiled.reference, _OneByOne(compiled.folder, manifest), bound=bound)
    sizes = weight_bytes(compiled.reference)
    done, total = 0, sum(sizes[call.segment] for call in compiled.reference.split.calls)

    def on_call(call: Call, read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
        nonlocal done
        compared(call, read, written)
        done += sizes[call.segment]
        report("checking: the weights of all layers", done, max(1, total))

    for _ in run_chunks(compiled.reference, [token_ids(compiled, rows)], on_call=on_call):
        pass
    worst = compared.worst
    if not worst.size <= worst.bound:
        raise refusal(
            compiled,
            f"segment {worst.segment} of the program gives other numbers than the model's on the same inputs: noise "
            f"{worst.size:.2g}, expected at most {worst.bound:.2g}",
        )
    return worst.size


def _over_stored_rows(program: Program, name: str) -> Callable[..., Any]:
    """A method that takes keys and values in float32 and stores them as the program's cache does."""
    split, run = program.split, program.methods[name]
    values = {value.name: value for value in split.values if value.kind == "cache"}
    read = next(call.reads for call in split.calls if name in split.segment(call.segment).methods())

    def over_rows(*inputs: Tensor) -> Any:
        given = zip(inputs, read, strict=True)
        return run(*(in_format(x, values[each]) if each in values else x for x, each in given))

    return over_rows


class _OneByOne(Mapping[str, Callable[..., Any]]):
    """A program's methods, of which the one that was asked for last is loaded."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._loaded: dict[str, Callable[..., Any]] = {}

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._loaded:
            self._loaded.clear()  # first, so that two are never there at once
            self._loaded[name] = _over_stored_rows(self._open(), name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open().methods)

    def __len__(self) -> int:
        return len(self._open().methods)

    def _open(self) -> Program:
        return Program(self._folder, self._manifest, keeps_packed=False)
