"""Folders whose weights are quantized: which methods are read, and their tensors as a plain model's, in float32.

What a method does to activations is left out: a program quantizes by its own recipe. Knows nothing of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doubleweave.errors import SourceError, first_line
from doubleweave.sources import dequantize
from doubleweave.sources.saved_tensors import Saved, SavedTensors

# By name of a plain model's tensor, what makes it; None for a tensor as the files have it.
Named = Iterator[tuple[str, Callable[[], Tensor] | None]]
Settings = Mapping[str, Any]
_CT_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
)
# As safetensors and as torch write it.
_FP8 = ("F8_E4M3", "F8_E5M2", "torch.float8_e4m3fn", "torch.float8_e5m2")
# Scales of what flows through a layer, and of a cache: no part of a weight.
_ACTIVATIONS = (
    *(f".{what}_{of}" for what in ("input", "output", "q", "k", "v") for of in ("scale", "zero_point")),
    ".activation_scale",
    ".input_scale_ub",
    ".input_global_scale",
)


def settings_of(config: Mapping[str, Any]) -> Settings | None:
    """The quantization that config.json names, of the model or of its text part, None for none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            # compressed-tensors used the second name at first.
            found = part.get("quantization_config") or part.get("compression_config")
            if isinstance(found, Mapping) and found:
                return found
    return None


def method_of(settings: Settings) -> str:
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    return str(settings.get("quant_method") or "without a quant_method")


def check_readable(path: Path, settings: Settings) -> None:
    """Raise SourceError for a method, or a layout of one, that is not read."""
    method = method_of(settings)
    reason = "" if method in READERS else f"the method {method!r}"
    if method in READERS:
        unread = _UNREAD.get(method)
        reason = unread(settings) if unread else ""
    if reason:
        raise SourceError(
            f"{path}: its weights are quantized by {reason}, expected one of {', '.join(READERS)}; use the folder of "
            "the model before it was quantized"
        )


class PlainTensors(SavedTensors):
    """`tensors` as a plain model's: each quantized weight is float32, made of its parts whenever it is read.

    Raises SourceError for one whose parts do not fit.
    """

    def __init__(self, path: Path, settings: Settings, tensors: SavedTensors) -> None:
        listed = READERS[method_of(settings)](_Saved(path, tensors), settings)
        self._tensors = tensors
        self._makers = {name: make for name, make in listed if not name.endswith(_ACTIVATIONS)}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __getitem__(self, name: str) -> Tensor:
        make = self._makers[name]
        return self._tensors[name] if make is None else make()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; of a quantized weight it is what comes out when it is made for the first time."""
        if self._makers[name] is None:
            return self._tensors.shape(name)
        if name not in self._shapes:
            self._shapes[name] = tuple(self[name].shape)
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(name) if self._makers[name] is None else str(torch.float32)

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Saved]]:
        with ExitStack() as files:
            found: list[Saved] = []
            for name in names:
                make = self._makers[name]
                found += files.enter_context(self._tensors.opened([name])) if make is None else [make()]
            yield found


class _Saved:
    """The tensors, with a sentence where one is missing or a weight cannot be made of its parts."""

    def __init__(self, path: Path, tensors: SavedTensors) -> None:
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise SourceError(f"{self.path}: {name} is in none of its files, but a quantized weight needs it")
        with self.tensors.opened([name]) as (found,):
            return found[:].clone() if len(found.shape) else self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.tensors else None

    def each(self, main: str, parts: Sequence[str], target: str, make: Callable[[str], Tensor]) -> Named:
        """Every tensor: for one that ends with `main` what `make` gives for the name before it, without its parts."""
        for name in self.tensors:
            before = name.removesuffix(main)
            if before != name:
                yield before + target, self.maker(name, partial(make, before))
            elif not any(
                name.endswith(part) and name.removesuffix(part) + main in self.tensors for part in parts
            ):
                yield name, None

    def maker(self, name: str, make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return partial(self.made, name, make)

    def made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        try:
            return make()
        except SourceError as error:
            message = str(error)
            if message.startswith(str(self.path)):
                raise
            raise SourceError(f"{self.path}: {name} cannot be dequantized: {message}") from error
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = first_line(error, "", 200)
            raise SourceError(
                f"{self.path}: {name} cannot be dequantized ({type(error).__name__}: {reason}); its parts do not fit "
                "together, fetch the files again"
            ) from error


def _gptq(saved: _Saved, settings: Settings) -> Named:
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1

    def make(name: str) -> Tensor:
        return dequantize.gptq(
            saved[f"{name}.qweight"],
            saved[f"{name}.qzeros"],
            saved[f"{name}.scales"],
            saved.get(f"{name}.g_idx"),
            offset,
            int(settings.get("group_size", -1)),
        )

    return saved.each(".qweight", (".qzeros", ".scales", ".g_idx"), ".weight", make)


def _awq(saved: _Saved, settings: Settings) -> Named:
    def make(name: str) -> Tensor:
        return dequantize.awq(*(saved[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")))

    return saved.each(".qweight", (".qzeros", ".scales"), ".weight", make)


def _compressed_tensors(saved: _Saved, settings: Settings) -> Named:
    of_weights = [
        group.get("weights") or {}
        for group in (settings.get("config_groups") or {}).values()
        if isinstance(group, Mapping)
    ]
    widths = {int(weights["num_bits"]) for weights in of_weights if weights.get("num_bits")}
    blocks = [[1, int(weights["group_size"])] for weights in of_weights if weights.get("group_size")]
    blocks += [weights["block_structure"] for weights in of_weights if weights.get("block_structure")]

    def packed(name: str) -> Tensor:
        words, scale = saved[f"{name}.weight_packed"], saved[f"{name}.weight_scale"]
        rows, columns = saved[f"{name}.weight_shape"].tolist()
        fits = [bits for bits in widths if -(-columns * bits // 32) == words.shape[-1]]
        if len(fits) != 1:
            raise SourceError(f"found {words.shape[-1]} words for {columns} numbers of {sorted(widths)} bits")
        bits, half = fits[0], 1 << (fits[0] - 1)
        zeros = saved.get(f"{name}.weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:  # packed along the rows
            zeros = dequantize.unpacked(zeros.T.contiguous(), bits, rows).T - half
        values = dequantize.unpacked(words, bits, columns) - half
        group = saved.get(f"{name}.weight_g_idx")
        if group is not None and int(group.min()) >= 0:
            scale = scale[:, group.long()]
            zeros = None if zeros is None else zeros[:, group.long()]
        return dequantize.scaled(values, scale, zeros, blocks)

    def plain(name: str) -> Tensor:
        weight, scale = saved[f"{name}.weight"], saved[f"{name}.weight_scale"]
        if weight.dtype not in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
            raise SourceError(f"found {weight.dtype} with scales, expected numbers of 8 bits")
        return dequantize.scaled(weight, scale, saved.get(f"{name}.weight_zero_point"), blocks)

    parts = (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
    for name, make in saved.each(".weight_packed", parts, ".weight", packed):
        if name.endswith(".weight") and name in saved and f"{name}_scale" in saved:
            yield name, saved.maker(name, partial(plain, name.removesuffix(".weight")))
        elif not any(name.endswith(part) for part in parts):
            yield name, make


def _fp8(saved: _Saved, settings: Settings) -> Named:
    """Numbers of 8 bits whose scales lie beside them: NAME_scale_inv or NAME_scale, of blocks, rows or all."""
    blocks = [list(settings.get("weight_block_size") or (128, 128))]
    scales = ("_scale_inv", "_scale")

    def make(name: str, scale: str) -> Tensor:
        return dequantize.scaled(saved[name], saved[scale], None, blocks)

    for name in saved.tensors:
        if any(name.endswith(part) and name.removesuffix(part) in saved for part in scales):
            continue
        found = next((name + part for part in scales if name + part in saved), None)
        dtype = saved.tensors.dtype(name)
        if dtype in _FP8:
            yield name, saved.maker(name, partial(make, name, found or name + scales[0]))
        elif found is not None:
            raise SourceError(f"{saved.path}: {name} is {dtype} with scales, expected numbers of 8 bits")
        else:
            yield name, None


def _mxfp4(saved: _Saved, settings: Settings) -> Named:
    return saved.each(
        "_blocks",
        ("_scales",),
        "",
        lambda name: dequantize.mxfp4(saved[f"{name}_blocks"], saved[f"{name}_scales"]),
    )


def _bitsandbytes(saved: _Saved, settings: Settings) -> Named:
    parts = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB")

    def four(name: str) -> Tensor:
        states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        state = next((state for state in states if state in saved.tensors), states[0])
        return dequantize.bitsandbytes_4bit(
            saved[name],
            saved[f"{name}.absmax"],
            saved[f"{name}.quant_map"],
            saved[state],
            saved.get(f"{name}.nested_absmax"),
            saved.get(f"{name}.nested_quant_map"),
        )

    def eight(name: str, rows: str) -> Tensor:
        return dequantize.scaled(saved[name], saved[rows].float() / 127)

    for name in saved.tensors:
        rows = f"{name.removesuffix('.weight')}.SCB"
        if f"{name}.absmax" in saved.tensors:
            yield name, saved.maker(name, partial(four, name))
        elif name.endswith(".weight") and rows in saved.tensors:
            yield name, saved.maker(name, partial(eight, name, rows))
        elif not name.endswith((*parts, ".weight_format")) and ".quant_state." not in name:
            yield name, None


def _unread_gptq(settings: Settings) -> str:
    layout = settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        return f"gptq in the layout {layout if layout != 'gptq' else 'marlin'!r}"
    return ""


def _unread_awq(settings: Settings) -> str:
    version, bits = (
        str(settings.get("version", "gemm")).lower(),
        settings.get("bits", settings.get("w_bit", 4)),
    )
    if version not in ("gemm", "exllama", "ipex"):  # the last two run what the first has written
        return f"awq in the layout {version!r}"
    return "" if bits == 4 else f"awq with {bits} bits"


def _unread_compressed_tensors(settings: Settings) -> str:
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    for layout in (settings.get("format"), *(group.get("format") for group in groups)):
        if layout is not None and layout not in _CT_FORMATS:
            return f"compressed-tensors in the format {layout!r}"
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        return f"compressed-tensors with the sparsity {sparsity!r}"
    return "compressed-tensors with transforms" if settings.get("transform_config") else ""


READERS: dict[str, Callable[[_Saved, Settings], Named]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}
_UNREAD: dict[str, Callable[[Settings], str]] = {
    "gptq": _unread_gptq,
    "awq": _unread_awq,
    "compressed-tensors": _unread_compressed_tensors,
}
