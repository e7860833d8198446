"""Write methods as one ExecuTorch program file (.pte), every piece of data once, and each as soon as it is there.

ExecuTorch's own writer keeps a constant of a CPU kernel and the same bytes as a delegate's named datum
twice (a tied embedding). In the file both are byte ranges, so here they are the same range.

The format is ExecuTorch's: schema/program.fbs and exir/_serialize/_program.py (extended header, segments).
"""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import itertools
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from doubleweave.compiler.lower.templates import Data, Template, encode
from doubleweave.errors import LowerError
from doubleweave.files import sha256_of

_KEY = re.compile(rb"(?:scale_)?[0-9a-f]{64}")
_ALIGNMENT = 128  # ExecuTorch's default for segments
# A flatbuffer leaves out zeros, and has a table of fields for each set of them that occurs.
_SLACK = 4096
_BLOCK = 8 << 20  # bytes that are copied at a time


class Method(NamedTuple):
    """A method to write: its name, and the template that its weights are put into."""

    name: str
    template: Template


class _Place(NamedTuple):
    """Where a piece of data lies, from the first one on."""

    offset: int
    size: int


def _aligned(size: int) -> int:
    return (size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


class ProgramWriter:
    """Writes methods to a file. In a `with` block: `add` each of `methods`, then `finish`.

    The header comes first in the file and knows where everything lies, so room is left for the largest that there may
    be; what delegates read follows as it comes. Constants of CPU kernels are kept back and written last, small ones
    first: they are read where they lie in the mapped file, and scattered among the delegates' data they kept 50 MB
    resident. Raises LowerError when the file cannot be written.
    """

    def __init__(self, path: Path, methods: Sequence[Method]) -> None:
        self._path = path
        self._plans: list[Any] = []
        self._digests: list[str] = []  # of each piece, hex
        self._sizes: list[int] = []  # of each piece, bytes
        self._pieces: dict[str, int] = {}  # digest -> piece
        self._places: dict[int, _Place] = {}  # of the pieces that are written
        self._held: dict[int, int] = {}  # of the others: where they lie in `_aside`
        self._named: dict[str, int] = {}  # key -> piece
        self._buffers: dict[int, int] = {}  # piece -> number of the constant buffer, from 1
        self._end = 0
        self._base = _aligned(len(_largest_header(methods)) + _SLACK)
        with self._may_fail():
            self._file = open(path, "wb")  # noqa: SIM115  __exit__ closes it
            self._aside = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  the same

    def __enter__(self) -> ProgramWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # What is still to be flushed may not find room either; what is being raised says more.
        try:
            self._aside.close()
            self._file.close()
        except OSError:
            if error is None:
                raise

    def add(self, method: Method, weights: tuple[Tensor, ...]) -> int:
        """Add one method: its template over a segment's weights. Returns the bytes of weights it uses, with those in
        the payloads of delegates that keep weights there."""
        from executorch.exir.schema import BackendDelegateDataReference, DataLocation

        template = method.template
        keys: dict[bytes, bytes] = {}
        used: dict[int, int] = {}
        # Constants first: what a delegate reads as well is then known to be one.
        numbers = {0: 0}
        for index, source in enumerate(template.buffers[1:], start=1):
            data = encode(source, weights)
            piece = self._piece(data, is_constant=True)
            numbers[index] = self._buffers.setdefault(piece, len(self._buffers) + 1)
            used[piece] = len(data)
        for key, source in template.named.items():
            data = encode(source, weights)
            # A key is the digest of its data, and stands in the delegate's payload as text. All have equal length, so
            # another layer's key takes its place without moving anything.
            piece = self._piece(data)
            new_key = ("scale_" if key.startswith("scale_") else "") + self._digests[piece]
            keys[key.encode()] = new_key.encode()
            self._named[new_key] = piece
            used[piece] = len(data)
        plan: Any = copy.deepcopy(template.plan)
        plan.name = method.name
        for delegate in plan.delegates:
            payload = template.payloads[delegate.processed.index]
            payload = _KEY.sub(lambda match: keys.get(match.group(), match.group()), payload)
            piece = self._piece(payload)
            # Segment 0 holds the constants (see _header).
            delegate.processed = BackendDelegateDataReference(DataLocation.SEGMENT, index=1 + piece)
            if not template.named:  # then the payload itself holds the weights, as QNN's does
                used[piece] = len(payload)
        for value in plan.values:
            if type(value.val).__name__ == "Tensor":
                value.val.data_buffer_idx = numbers[value.val.data_buffer_idx]
        self._plans.append(plan)
        return sum(used.values())

    def finish(self) -> str:
        """Write what is left, and return the file's SHA-256 (hex)."""
        for piece in sorted(self._held, key=self._sizes.__getitem__):
            self._write(piece, self._read_back(piece))
        header = _header(
            self._plans,
            [self._places[piece] for piece in range(len(self._digests))],
            self._named,
            self._buffers,
            self._base,
        )
        assert len(header) <= self._base
        with self._may_fail():
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
        return sha256_of(self._path)

    def _piece(self, data: Data, *, is_constant: bool = False) -> int:
        """The number of a piece of data, written or held back when it is met first."""
        digest = hashlib.sha256(data).hexdigest()
        if (found := self._pieces.get(digest)) is not None:
            return found
        piece = self._pieces[digest] = len(self._digests)
        self._digests.append(digest)
        self._sizes.append(len(data))
        if is_constant:
            with self._may_fail():
                self._held[piece] = self._aside.seek(0, io.SEEK_END)
                self._aside.write(data)
        else:
            self._write(piece, [data])
        return piece

    def _read_back(self, piece: int) -> Iterator[bytes]:
        """The data of a piece that is held back, in blocks."""
        self._aside.seek(self._held[piece])
        left = self._sizes[piece]
        while left:
            block = self._aside.read(min(left, _BLOCK))
            left -= len(block)
            yield block

    def _write(self, piece: int, blocks: Iterable[Data]) -> None:
        size = self._sizes[piece]
        with self._may_fail():
            self._file.seek(self._base + self._end)
            for block in blocks:
                self._file.write(block)
            self._file.write(bytes(_aligned(size) - size))
        self._places[piece] = _Place(self._end, size)
        self._end += _aligned(size)

    @contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise LowerError(
                f"{self._path}: cannot be written: {reason}, behind {self._end >> 20} MiB of the program: free some "
                "space or choose another folder with -o"
            ) from error


def _largest_header(methods: Sequence[Method]) -> bytes:
    """The header that these methods have where no two pieces of data are equal, which makes it no smaller."""
    from executorch.exir.schema import BackendDelegateDataReference, DataLocation

    pieces = itertools.count()
    plans: list[Any] = []
    named: dict[str, int] = {}
    buffers: dict[int, int] = {}
    for name, template in methods:
        plan: Any = copy.deepcopy(template.plan)
        plan.name = name
        for key in template.named:
            named[f"{key[:-64]}{next(pieces):064}"] = len(named)
        for delegate in plan.delegates:
            delegate.processed = BackendDelegateDataReference(DataLocation.SEGMENT, index=1 + next(pieces))
        for _ in template.buffers[1:]:
            buffers[next(pieces)] = len(buffers) + 1
        plans.append(plan)
    # Numbers in a flatbuffer take as many bytes whatever they are, but for zero.
    places = [_Place(1, 1)] * next(pieces)
    return _header(plans, places, named, buffers, 1)


def _header(
    plans: Sequence[Any],
    places: Sequence[_Place],
    named: Mapping[str, int],
    buffers: Mapping[int, int],
    base: int,
) -> bytes:
    """The flatbuffer with ExecuTorch's extended header; everything else is segments behind it, from `base` on."""
    from executorch.exir._serialize import _program as serialize
    from executorch.exir.schema import DataSegment, NamedData, Program, SubsegmentOffsets

    # Segment 0 spans the constants, which are offsets into it; each piece is a segment besides.
    first = min((places[piece].offset for piece in buffers), default=0)
    end = max((places[piece].offset + places[piece].size for piece in buffers), default=first)
    spans = [_Place(first, end - first), *places]
    program = Program(
        version=0,
        execution_plan=list(plans),
        constant_buffer=[],
        backend_delegate_data=[],
        segments=[DataSegment(offset=offset, size=size) for offset, size in spans],
        constant_segment=SubsegmentOffsets(
            segment_index=0, offsets=[0, *(places[piece].offset - first for piece in buffers)]
        ),
        mutable_data_segments=None,
        named_data=[NamedData(key=key, segment_index=1 + piece) for key, piece in named.items()],
    )
    flatbuffer = serialize._program_to_flatbuffer(
        program, constant_tensor_alignment=_ALIGNMENT, delegate_alignment=None
    )
    length = serialize.aligned_size(serialize._ExtendedHeader.EXPECTED_LENGTH, flatbuffer.max_alignment)
    size = length + len(flatbuffer.data)
    header = serialize._ExtendedHeader(
        program_size=size,
        segment_base_offset=base,
        segment_data_size=max((_aligned(offset + size) for offset, size in places), default=0),
    ).to_bytes()
    data: bytes = serialize._insert_flatbuffer_header(
        flatbuffer_data=flatbuffer.data,
        magic_regex=r"ET[0-9a-zA-Z][0-9a-zA-Z]",
        header_data=serialize.pad_to(header, length),
    )
    return data
