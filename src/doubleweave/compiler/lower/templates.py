"""Lowered methods as templates: what a structure compiles to, apart from its weights.

Layers of a model differ in their weights alone, so each structure is lowered once, over made-up weights,
and its template is filled with each layer's own: the weights' digests are the keys under which the
program stores them, and keys of equal length replace one another in the delegate's payload. That makes
compile time flat in depth. `pte_file.py` writes filled templates to a file.

It knows nothing of models or devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from doubleweave.compiler.backends.unread_weights import LEAST_BYTES, UnreadWeights
from doubleweave.compiler.split.pieces import SMALL_BYTES
from doubleweave.ir.split import Traffic

Data = bytes | memoryview


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's own memory, in order."""
    numbers: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


@dataclass(frozen=True)
class Constant:
    """Bytes in a program that are those of weight `index` of the segment."""

    index: int


@dataclass(frozen=True)
class Template:
    """A lowered method without its weights.

    `plan` is ExecuTorch's ExecutionPlan; `payloads` the delegates' processed bytes; `named` and `buffers`
    say where each named datum and each constant buffer comes from (bytes: the same in every layer).
    `is_complete`: every weight was found again, so that another layer's weights can take its place. A backend that
    keeps a weight in another layout (a convolution's) leaves the template incomplete. `traffic`: the bytes that move
    in a run, as the backend's compiler reports them; None where it does not.
    """

    plan: object
    payloads: tuple[bytes, ...]
    named: dict[str, Constant | bytes]
    buffers: tuple[Constant | bytes, ...]
    is_complete: bool
    num_operators: int = 0
    num_delegated: int = 0
    traffic: Traffic | None = None


def encode(source: Constant | bytes, weights: tuple[Tensor, ...]) -> Data:
    """The bytes a template's constant has over these weights."""
    return source if isinstance(source, bytes) else raw_bytes(weights[source.index])


class MadeUp(NamedTuple):
    """Weights of which some are made up (`numbers`), and of these some unread."""

    weights: tuple[Tensor, ...]
    numbers: frozenset[int]
    unread: UnreadWeights


def as_they_are(weights: tuple[Tensor, ...]) -> MadeUp:
    return MadeUp(weights, frozenset(), UnreadWeights())


def may_be_made_up(tensor: Tensor) -> bool:
    """Whether backends look at the shape alone, or the range: not for zero points and the like."""
    return tensor.dtype == torch.int8 or tensor.is_floating_point()


def made_up(weights: tuple[Tensor, ...], matrices: Set[int] = frozenset()) -> MadeUp:
    """Random tensors, all different, of the same shapes and dtypes, by which a template's weights are found.

    Backends look at zero points, at the range of 4-bit values and at the sign of scales, so these are kept. Tensors of
    less than 16 bytes are kept too: their bytes could be met by chance, so they are part of the structure (pieces.py).
    The weights may be fake. `matrices`: those whose numbers nobody looks at; large ones are memory that is not read.
    """
    generator = torch.Generator().manual_seed(20260)
    unread = UnreadWeights()

    def one(index: int, tensor: Tensor) -> Tensor:
        if tensor.nbytes < SMALL_BYTES:
            return tensor
        if index in matrices and tensor.nbytes >= LEAST_BYTES:
            return unread.stand_in(index, tensor.shape, tensor.dtype)
        if tensor.dtype == torch.int8:
            low, high = (-8, 8) if isinstance(tensor, FakeTensor) or _has_4_bits(tensor) else (-127, 128)
            return torch.randint(low, high, tensor.shape, dtype=torch.int8, generator=generator)
        if tensor.is_floating_point():
            return (torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor.dtype)
        return tensor

    made = tuple(one(index, tensor) for index, tensor in enumerate(weights))
    numbers = frozenset(i for i, (a, b) in enumerate(zip(made, weights, strict=True)) if a is not b)
    return MadeUp(made, numbers, unread)


def _has_4_bits(tensor: Tensor) -> bool:
    return int(tensor.min()) >= -8 and int(tensor.max()) < 8


def make_templates(program: Any, named_data: Any, over: MadeUp) -> dict[str, Template]:
    """Turn emitted methods (exir's Program, its NamedDataStoreOutput) into templates, by the method's name."""
    made_up = over.numbers
    by_digest: dict[bytes, Constant | bytes] = {
        digest: Constant(index) for digest, index in over.unread.digests().items()
    }
    read = {index: tensor for index, tensor in enumerate(over.weights) if tensor not in over.unread}
    for index, tensor in read.items():
        by_digest.setdefault(hashlib.sha256(raw_bytes(tensor)).digest(), Constant(index))
    _check_distinct([read[index] for index in made_up if index in read])

    def origin(data: bytes) -> Constant | bytes:
        return by_digest.get(hashlib.sha256(data).digest(), data)

    entries = {} if named_data is None else named_data.pte_data
    named = {key: origin(bytes(named_data.buffers[entry.buffer_index])) for key, entry in entries.items()}
    buffers = tuple(origin(bytes(buffer.storage)) for buffer in program.constant_buffer)
    payloads = tuple(bytes(item.data) for item in program.backend_delegate_data)
    sources = [*named.values(), *buffers]
    found = {source.index for source in sources if isinstance(source, Constant)}
    rest = [source for source in sources if isinstance(source, bytes)]
    is_complete = not made_up or (made_up <= found and not any(map(_may_be_weights, rest)))
    return {
        plan.name: Template(plan, payloads, named, buffers, is_complete) for plan in program.execution_plan
    }


def _may_be_weights(data: bytes) -> bool:
    """Whether bytes in a program may be weights in another form: not if they are few or all the same number."""
    return len(data) >= 4 * SMALL_BYTES and data != data[:4] * (len(data) // 4)


def _check_distinct(weights: Sequence[Tensor]) -> None:
    digests = [hashlib.sha256(raw_bytes(t)).digest() for t in weights if t.any() and t.nbytes >= SMALL_BYTES]
    assert len(set(digests)) == len(digests), "made-up weights must differ"
