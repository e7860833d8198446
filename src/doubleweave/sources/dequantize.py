"""The numbers of quantized weights in float32, from the published layouts of their tensors.

R rows (outputs), C columns (inputs), G groups. Knows nothing of folders or names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from doubleweave.errors import SourceError

# AutoAWQ's order: the nibble at position i of a word holds column _AWQ[i] of eight.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
# OCP Microscaling formats, FP4 (E2M1): the sign is the highest bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` unsigned numbers of `bits` bits along the last axis of int32 words, lowest bits first, without gaps."""
    if 8 % bits == 0 and sys.byteorder == "little":  # no number begins in one byte and ends in the next
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        numbers = (words.contiguous().view(torch.uint8)[..., None] >> shifts).bitwise_and_((1 << bits) - 1)
        return numbers.flatten(-2).narrow(-1, 0, count).int()
    first_bit = torch.arange(count) * bits
    index, shift = first_bit // 32, first_bit % 32
    unsigned = torch.cat((words.long() & 0xFFFFFFFF, torch.zeros_like(words[..., :1], dtype=torch.int64)), -1)
    both = unsigned[..., index] | (unsigned[..., index + 1] << 32).where(shift + bits > 32, 0)
    return ((both >> shift) & ((1 << bits) - 1)).int()


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, zero_offset: int, group_size: int
) -> Tensor:
    """GPTQ (AutoGPTQ, GPTQModel): qweight [C·bits/32, R] int32, qzeros [G, R·bits/32], scales [G, R] to [R, C].

    zero_offset: 1 in files of the first version, which store each zero point less one. group_size: where there is no
    g_idx [C], the group of each column.
    """
    bits = _bits(qzeros.shape[1], scales.shape[1])
    columns = qweight.shape[0] * 32 // bits
    values = unpacked(qweight.T.contiguous(), bits, columns)
    zeros = (unpacked(qzeros, bits, scales.shape[1]) + zero_offset) & ((1 << bits) - 1)
    size = group_size if group_size > 0 else columns
    group = torch.arange(columns) // size if g_idx is None else g_idx.long()
    if int(group.max()) >= scales.shape[0] or int(group.min()) < 0:
        raise SourceError(f"found {scales.shape[0]} groups of scales, expected {int(group.max()) + 1}")
    # Whole numbers of 9 bits: float32 subtracts them exactly.
    found = values.float().sub_(_of_groups(zeros.float().T, group))
    return found.mul_(_of_groups(scales.float().T, group))


def _of_groups(parts: Tensor, group: Tensor) -> Tensor:
    """parts [R, G], group [C] to [R, C]: what each column's group has."""
    size, rest = divmod(len(group), parts.shape[1])
    if rest == 0 and torch.equal(group, torch.arange(len(group)) // size):
        return parts.repeat_interleave(size, 1)
    return parts[:, group]


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """AWQ ("gemm"): qweight [C, R/8] int32, qzeros [G, R/8], scales [G, R] to [R, C]."""

    def columns(words: Tensor) -> Tensor:
        order = torch.tensor(_AWQ).argsort()
        nibbles = unpacked(words, 4, 8 * words.shape[-1]).view(*words.shape, 8)
        return torch.stack([nibbles[..., place] for place in order.tolist()], -1).flatten(-2)

    group_size = qweight.shape[0] // scales.shape[0]
    values = columns(qweight)
    zeros = columns(qzeros).repeat_interleave(group_size, 0)
    return ((values - zeros).float() * scales.float().repeat_interleave(group_size, 0)).T.contiguous()


def scaled(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None = None, blocks: Sequence[Sequence[int]] = ()
) -> Tensor:
    """(weight - zero_point) · scale, where a scale is of the tensor, a row, a group of columns or a block.

    blocks: the sizes [rows, columns] that a block may have.
    """
    shape = tuple(weight.shape)
    found = weight.float()
    if zero_point is not None:
        found = found - _spread(zero_point, shape, blocks)
    return found * _spread(scale, shape, blocks)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 of gpt-oss: blocks [..., R, G, 16] uint8, two numbers a byte, scales [..., R, G] to [..., 32·G, R]."""
    table = torch.tensor(_FP4)
    low, high = table[(blocks & 15).long()], table[(blocks >> 4).long()]
    values = torch.stack((low, high), -1).flatten(-2)
    exponents = scales.int() - 127
    return torch.ldexp(values, exponents[..., None]).flatten(-2).transpose(-1, -2).contiguous()


def bitsandbytes_4bit(
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    state: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
) -> Tensor:
    """bitsandbytes' nf4 and fp4: two numbers a byte, the first in the high bits; `state` is the bytes of a JSON object.

    Nested: the scales of blocks are 8-bit numbers with scales of their own.
    """
    about = json.loads(bytes(state.tolist()).decode())
    scales = absmax.float()
    if nested_absmax is not None and nested_map is not None:
        blocks = nested_absmax.float().repeat_interleave(int(about["nested_blocksize"]))[: absmax.numel()]
        scales = nested_map.float()[absmax.long()] * blocks + float(about["nested_offset"])
    # The bytes may be stored as numbers of another type (quant_storage).
    flat = packed.contiguous().view(torch.uint8).reshape(-1)
    count = int(torch.Size(about["shape"]).numel())
    values = quant_map.float()[torch.stack((flat >> 4, flat & 15), -1).flatten().long()][:count]
    return (values * scales.repeat_interleave(int(about["blocksize"]))[:count]).reshape(about["shape"])


def _bits(words: int, count: int) -> int:
    bits, rest = divmod(words * 32, count)
    if rest or not 1 <= bits <= 8:
        raise SourceError(f"found {words} words for {count} zero points, expected 2 to 8 bits each")
    return bits


def _spread(scale: Tensor, shape: tuple[int, ...], blocks: Sequence[Sequence[int]]) -> Tensor:
    """The scales in a shape that broadcasts to `shape`."""
    found = scale.float()
    if found.numel() == 1:
        return found.reshape(())
    if found.dim() == 1 and found.shape[0] == shape[0]:
        found = found.reshape(-1, *[1] * (len(shape) - 1))
    if found.dim() != len(shape):
        raise SourceError(f"found scales of the shape {list(found.shape)} for {list(shape)} numbers")
    for axis in (-1, -2) if len(shape) > 1 else (-1,):
        size, number = shape[axis], found.shape[axis]
        if number in (1, size):
            continue
        given = {block[axis] for block in blocks if len(block) >= -axis and block[axis] > 0}
        fits = {block for block in given if -(-size // block) == number}
        if not fits and size % number == 0:
            fits = {size // number}
        if len(fits) != 1:
            raise SourceError(f"found {number} scales for {size} numbers, expected one for each block")
        found = found.repeat_interleave(fits.pop(), axis).narrow(axis, 0, size)
    return found
