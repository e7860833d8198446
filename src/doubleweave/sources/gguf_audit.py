"""Hold a loaded module against its GGUF file, apart from the code that loads it.

Knows what the package gguf finds in the file and nothing of the loader, transformers' names or configs: weights are
compared by layer and by sums that permuted rows and shifted norms keep, rotary frequencies by the formulas of ggml.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doubleweave.sources.audit import Sums, sums
from doubleweave.sources.gguf_file import GgufFile

_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_FILE_LAYER, _MODULE_LAYER = re.compile(r"blk\.(\d+)\."), re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_CLOSE = 1e-4
_PIECE = 1 << 16  # elements of a tensor's data that are read at once


def audit(file: GgufFile, module: torch.nn.Module) -> str:
    """A sentence on the first difference between the file and the module, "" where there is none."""
    return _weights(file, module) or _rotary(file, module)


def _numbers(file: GgufFile, name: str) -> Iterator[Tensor]:
    """A tensor in float32, without what the loader does to it, a few rows at a time."""
    if len(file.shape(name)) == 1:
        yield torch.from_numpy(file.weights(name))
        return
    numbers, (rows, *others) = file.numbers(name), file.shape(name)
    # What is made of a piece stays in the processor's cache.
    step = max(1, _PIECE // math.prod(others))
    for start in range(0, rows, step):
        yield torch.from_numpy(numbers(slice(start, start + step)))


def _whole(file: GgufFile, name: str) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in _numbers(file, name)])


def _is_vector(shape: Sequence[int]) -> bool:
    return max(shape, default=0) == math.prod(shape)  # with or without axes of one


def _of_file(file: GgufFile, name: str) -> Sums:
    if _is_vector([int(size) for size in file.tensors[name].shape]):
        return _around_mean(_whole(file, name))
    return sum(map(sums, _numbers(file, name)), Sums())


def _of_module(parameter: Tensor) -> Sums:
    return _around_mean(parameter.detach()) if _is_vector(parameter.shape) else sums(parameter)


def _around_mean(vector: Tensor) -> Sums:
    """Of a vector's distances from its mean: a norm may be stored shifted by one."""
    wide = vector.double()
    return sums(wide - wide.mean())


def _weights(file: GgufFile, module: torch.nn.Module) -> str:
    in_file: dict[int | None, list[tuple[Sums, str]]] = defaultdict(list)
    in_module: dict[int | None, list[tuple[Sums, str]]] = defaultdict(list)
    for name in file.tensors:
        if name not in _ROTARY:
            layer = _FILE_LAYER.match(name)
            in_file[int(layer[1]) if layer else None].append((_of_file(file, name), name))
    for name, parameter in module.named_parameters():  # tied ones once
        layer = _MODULE_LAYER.search(f".{name}")
        in_module[int(layer[1]) if layer else None].append((_of_module(parameter), name))
    for layer_number in {**in_file, **in_module}:
        said = _layer(in_file[layer_number], in_module[layer_number])
        if said:
            return said
    return ""


def _layer(in_file: list[tuple[Sums, str]], in_module: list[tuple[Sums, str]]) -> str:
    elements = [_joined(found).count for found in (in_file, in_module)]
    names = (in_file or in_module)[0][1]
    if elements[0] != elements[1]:
        return f"the file has {elements[0]} weights beside {names}, the module {elements[1]}"
    if len(in_file) != len(in_module):  # experts are stacked: their sum is what can be compared
        in_file = [(_joined(in_file), f"{names} with its neighbours")]
        in_module = [(_joined(in_module), "weights there")]
    unmatched = list(in_module)
    for wanted, tensor in in_file:
        match = next((pair for pair in unmatched if _is_close(wanted, pair[0])), None)
        if match is None:
            found, parameter = _nearest(in_file, unmatched, wanted)
            return (
                f"the tensor {tensor} has {wanted.count} elements with sum {wanted.total:.6g} and absolutes "
                f"{wanted.absolute:.6g}, the module's {parameter} {found.count} with {found.total:.6g} and "
                f"{found.absolute:.6g}"
            )
        unmatched.remove(match)
    return ""


def _nearest(
    in_file: list[tuple[Sums, str]], unmatched: list[tuple[Sums, str]], wanted: Sums
) -> tuple[Sums, str]:
    """Of the parameters that are no tensor's, one of as many elements where there is one."""
    left = [
        pair for pair in unmatched if not any(_is_close(other, pair[0]) for other, _ in in_file)
    ] or unmatched
    return next((pair for pair in left if pair[0].count == wanted.count), left[0])


def _joined(found: list[tuple[Sums, str]]) -> Sums:
    return sum((part for part, _ in found), Sums())


def _is_close(wanted: Sums, found: Sums) -> bool:
    room = _CLOSE * max(1e-3, wanted.absolute)
    same = abs(wanted.absolute - found.absolute) <= room and abs(wanted.total - found.total) <= room
    return wanted.count == found.count and same


def _rotary(file: GgufFile, module: torch.nn.Module) -> str:
    for name, buffer in module.named_buffers():
        owner_name, _, last = name.rpartition(".")
        if not last.endswith("inv_freq") or "original" in last:
            continue
        owner = module.get_submodule(owner_name)
        local = last.startswith("sliding")
        found = buffer.detach().double().numpy().reshape(-1)
        wanted, scale = _frequencies(file, local)
        if wanted.shape != found.shape or not np.allclose(wanted, found, rtol=1e-4, atol=1e-12):
            off = (
                f"differ by up to {np.abs(found / wanted - 1).max():.3g}"
                if wanted.shape == found.shape
                else (f"are {len(found)}, not {len(wanted)}")
            )
            return f"the rotary frequencies ({name}) {off} from those of the file's keys and tensors"
        attribute = f"{last.removesuffix('inv_freq')}attention_scaling"
        given = float(getattr(owner, attribute, 1.0))
        if abs(given - scale) > 1e-4:
            return (
                f"the rotary embedding is scaled by {given:.6g} ({owner_name}.{attribute}), by the file's keys "
                f"{scale:.6g}"
            )
    return ""


def _frequencies(file: GgufFile, local: bool) -> tuple[np.ndarray[Any, Any], float]:
    """Inverse frequencies and the scale of sine and cosine (ggml's rope_yarn and llama.cpp's reading of the keys)."""
    prefix = f"{file.architecture}."
    keys = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    scaling = {
        key.removeprefix("rope.scaling."): value
        for key, value in keys.items()
        if key.startswith("rope.scaling.")
    }
    heads = keys["attention.head_count"]
    heads = max(heads) if isinstance(heads, list) else heads
    dims = keys.get(
        "rope.dimension_count", keys.get("attention.key_length", keys["embedding_length"] // heads)
    )
    base = keys.get("rope.freq_base", 10000.0)
    if local:
        base, scaling, keys = keys.get("rope.freq_base_swa", 10000.0), {"type": "none"}, {}
    pairs = np.arange(dims // 2, dtype=np.float64)
    plain = float(base) ** (-2.0 * pairs / dims)
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        if name in file.tensors and not local:
            plain = plain / _whole(file, name).double().numpy()
    attention = float(scaling.get("attn_factor", scaling.get("yarn_attn_factor", 1.0)))
    kind, factor = (
        scaling.get("type", "linear"),
        float(scaling.get("factor", keys.get("rope.scale_linear", 0))) or 1.0,
    )
    if kind == "linear" and "rope_factors_short.weight" not in file.tensors:
        return plain / factor, 1.0
    if kind == "yarn":
        context = scaling.get("original_context_length") or keys["context_length"]
        ends = [
            dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.get("yarn_beta_fast", 32.0), scaling.get("yarn_beta_slow", 1.0))
        ]
        low, high = max(0, math.floor(ends[0])), min(dims - 1, math.ceil(ends[1]))
        kept = 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)
        return plain / factor * (1 - kept) + plain * kept, attention * (1 + 0.1 * math.log(max(factor, 1.0)))
    return plain, attention if kind == "longrope" or "rope_factors_short.weight" in file.tensors else 1.0
