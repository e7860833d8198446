"""Lowered methods as templates: what a structure compiles to, apart from its weights.

Layers of a model differ in their weights alone, so each structure is lowered once, over made-up weights,
and its template is filled with each layer's own: the weights' digests are the keys under which the
program stores them, and keys of equal length replace one another in the delegate's payload. That makes
compile time flat in depth. `pte.py` writes filled templates to a file.

It knows nothing of models or devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _raw(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def _bfloat16(tensor: Tensor) -> bytes:
    return _raw(tensor.to(torch.bfloat16))


def _nibbles(tensor: Tensor) -> bytes:
    """Two 4-bit weights a byte, offset by 8, the even one low: XNNPACK's qc4w layout."""
    offset = (tensor.contiguous().view(-1).to(torch.int16) + 8).to(torch.uint8)
    return _raw(offset[1::2] << 4 | offset[::2])


_ENCODINGS: dict[str, Callable[[Tensor], bytes]] = {"raw": _raw, "bfloat16": _bfloat16, "nibbles": _nibbles}


@dataclass(frozen=True)
class Constant:
    """Bytes in a program that come from weight `index` of the segment, in some encoding."""

    index: int
    encoding: str


@dataclass(frozen=True)
class Template:
    """A lowered method without its weights.

    `plan` is ExecuTorch's ExecutionPlan; `payloads` the delegates' processed bytes; `named` and `buffers`
    say where each named datum and each constant buffer comes from (bytes: the same in every layer).
    """

    plan: object
    payloads: tuple[bytes, ...]
    named: dict[str, Constant | bytes]
    buffers: tuple[Constant | bytes, ...]
    num_operators: int
    num_delegated: int


def encode(source: Constant | bytes, weights: tuple[Tensor, ...]) -> bytes:
    """The bytes a template's constant has over these weights."""
    return source if isinstance(source, bytes) else _ENCODINGS[source.encoding](weights[source.index])


def made_up_weights(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random tensors, all different, of the same shapes and dtypes, by which a template's weights are found.

    What a backend looks at stays as it is: zero points are kept, 4-bit values stay in range, scales above
    zero. Tensors of less than 16 bytes are kept too: their bytes could be met by chance, so they are part
    of the structure (split.py).
    """
    generator = torch.Generator().manual_seed(20260)
    result = []
    for tensor in weights:
        if tensor.numel() * tensor.element_size() < 16:
            result.append(tensor)
        elif tensor.dtype == torch.int8:
            low, high = (-8, 8) if int(tensor.min()) >= -8 and int(tensor.max()) < 8 else (-127, 128)
            result.append(torch.randint(low, high, tensor.shape, dtype=torch.int8, generator=generator))
        elif tensor.is_floating_point():
            made_up = torch.rand(tensor.shape, generator=generator) + 0.5
            result.append(made_up.to(torch.bfloat16).to(tensor.dtype))
        else:
            result.append(tensor)
    return tuple(result)


def make_template(program: Any, named_data: Any, weights: tuple[Tensor, ...]) -> Template:
    """Turn an emitted method (exir's Program with one plan, its NamedDataStoreOutput) into a template."""
    (plan,) = program.execution_plan
    by_digest: dict[bytes, Constant | bytes] = {}
    for index, tensor in enumerate(weights):
        for encoding, to_bytes in _ENCODINGS.items():
            if encoding == "raw" or (encoding == "bfloat16") == tensor.is_floating_point():
                by_digest.setdefault(hashlib.sha256(to_bytes(tensor)).digest(), Constant(index, encoding))
    _check_distinct(weights)

    def origin(data: bytes) -> Constant | bytes:
        return by_digest.get(hashlib.sha256(data).digest(), data)

    named: dict[str, Constant | bytes] = {}
    if named_data is not None:
        for key, entry in named_data.pte_data.items():
            named[key] = origin(bytes(named_data.buffers[entry.buffer_index]))
    buffers = tuple(origin(bytes(buffer.storage)) for buffer in program.constant_buffer)
    payloads = tuple(bytes(item.data) for item in program.backend_delegate_data)
    return Template(plan, payloads, named, buffers, 0, 0)


def _check_distinct(weights: tuple[Tensor, ...]) -> None:
    digests = [
        hashlib.sha256(_raw(t)).digest() for t in weights if t.any() and t.numel() * t.element_size() >= 16
    ]
    assert len(set(digests)) == len(digests), "made-up weights must differ"
