"""Write methods as one ExecuTorch program file (.pte), every piece of data once.

ExecuTorch's own writer keeps a constant of a CPU kernel and the same bytes as a delegate's named datum
twice (a tied embedding). In the file both are byte ranges, so here they are the same range.

The format is ExecuTorch's: schema/program.fbs and exir/_serialize/_program.py (extended header, segments).
"""

from __future__ import annotations

import copy
import errno
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from doubleweave.compiler.lower.templates import Template, encode
from doubleweave.errors import LowerError

_KEY = re.compile(rb"(?:scale_)?[0-9a-f]{64}")
_ALIGNMENT = 128  # ExecuTorch's default for segments


@dataclass
class _Data:
    """Byte strings, each once."""

    pieces: list[bytes] = field(default_factory=list)
    index: dict[bytes, int] = field(default_factory=dict)

    def add(self, data: bytes) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self.index:
            self.index[digest] = len(self.pieces)
            self.pieces.append(data)
        return self.index[digest]


def _aligned(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def _layout(pieces: list[bytes], order: list[int]) -> tuple[list[int], int]:
    """(the offset of each piece, bytes in all) when they follow one another in this order."""
    offsets, end = [0] * len(pieces), 0
    for piece in order:
        offsets[piece] = end
        end = _aligned(end + len(pieces[piece]))
    return offsets, end


def _padded(parts: list[bytes]) -> Iterator[bytes]:
    for data in parts:
        yield data
        yield bytes(_aligned(len(data)) - len(data))


class ProgramWriter:
    """Collects methods and writes them."""

    def __init__(self) -> None:
        self._plans: list[Any] = []
        self._data = _Data()
        self._named: dict[str, int] = {}  # key -> piece
        self._buffers: dict[int, int] = {}  # piece -> number of the constant buffer, from 1

    def add(self, name: str, template: Template, weights: tuple[Tensor, ...]) -> int:
        """Add one method: the template over a segment's weights. Returns the bytes of weights it uses, with those in
        the payloads of delegates that keep weights there."""
        from executorch.exir.schema import BackendDelegateDataReference, DataLocation

        keys: dict[bytes, bytes] = {}
        used: dict[int, int] = {}
        for key, source in template.named.items():
            data = encode(source, weights)
            # A key is the digest of its data, and stands in the delegate's payload as text. All have equal length, so
            # another layer's key takes its place without moving anything.
            new_key = ("scale_" if key.startswith("scale_") else "") + hashlib.sha256(data).hexdigest()
            keys[key.encode()] = new_key.encode()
            self._named[new_key] = piece = self._data.add(data)
            used[piece] = len(data)
        plan: Any = copy.deepcopy(template.plan)
        plan.name = name
        for delegate in plan.delegates:
            payload = template.payloads[delegate.processed.index]
            payload = _KEY.sub(lambda match: keys.get(match.group(), match.group()), payload)
            piece = self._data.add(payload)
            # Segment 0 holds the constants (see _header).
            delegate.processed = BackendDelegateDataReference(DataLocation.SEGMENT, index=1 + piece)
            if not template.named:  # then the payload itself holds the weights, as QNN's does
                used[piece] = len(payload)
        numbers = {0: 0}
        for index, source in enumerate(template.buffers[1:], start=1):
            data = encode(source, weights)
            piece = self._data.add(data)
            numbers[index] = self._buffers.setdefault(piece, len(self._buffers) + 1)
            used[piece] = len(data)
        for value in plan.values:
            if type(value.val).__name__ == "Tensor":
                value.val.data_buffer_idx = numbers[value.val.data_buffer_idx]
        self._plans.append(plan)
        return sum(used.values())

    def write(self, path: Path) -> str:
        """Write the file and return its SHA-256 (hex). Raises LowerError when it cannot be written."""
        # Constants of CPU kernels come first, small ones in front: they are read where they lie in the mapped file, and
        # scattered among the delegates' data they kept 50 MB resident.
        pieces = self._data.pieces
        order = sorted(range(len(pieces)), key=lambda i: (i not in self._buffers, len(pieces[i])))
        offsets, size = _layout(pieces, order)
        header = self._header(offsets, size)
        digest = hashlib.sha256()
        try:
            with open(path, "wb") as file:
                for data in _padded([header, *(pieces[i] for i in order)]):
                    digest.update(data)
                    file.write(data)
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            needed = (len(header) + size) >> 20
            raise LowerError(
                f"{path}: cannot be written: {reason}; the program takes {needed + 1} MiB: free some space or "
                "choose another folder with -o"
            ) from error
        return digest.hexdigest()

    def _header(self, offsets: list[int], data_bytes: int) -> bytes:
        """The flatbuffer with ExecuTorch's extended header; everything else is segments behind it."""
        from executorch.exir._serialize import _program as serialize
        from executorch.exir.schema import DataSegment, NamedData, Program, SubsegmentOffsets

        pieces = self._data.pieces
        # Segment 0 spans the constants, which are offsets into it; each piece is a segment besides.
        constant_bytes = max((offsets[piece] + len(pieces[piece]) for piece in self._buffers), default=0)
        spans = [(0, constant_bytes), *zip(offsets, map(len, pieces), strict=True)]
        program = Program(
            version=0,
            execution_plan=self._plans,
            constant_buffer=[],
            backend_delegate_data=[],
            segments=[DataSegment(offset=offset, size=size) for offset, size in spans],
            constant_segment=SubsegmentOffsets(
                segment_index=0, offsets=[0, *(offsets[piece] for piece in self._buffers)]
            ),
            mutable_data_segments=None,
            named_data=[NamedData(key=key, segment_index=1 + piece) for key, piece in self._named.items()],
        )
        flatbuffer = serialize._program_to_flatbuffer(
            program, constant_tensor_alignment=_ALIGNMENT, delegate_alignment=None
        )
        length = serialize.aligned_size(serialize._ExtendedHeader.EXPECTED_LENGTH, flatbuffer.max_alignment)
        size = length + len(flatbuffer.data)
        header = serialize._ExtendedHeader(
            program_size=size, segment_base_offset=_aligned(size), segment_data_size=data_bytes
        ).to_bytes()
        data: bytes = serialize._insert_flatbuffer_header(
            flatbuffer_data=flatbuffer.data,
            magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
            header_data=serialize.pad_to(header, length),
        )
        return data
