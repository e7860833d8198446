"""Make a transformers module whose weights stay in the files (file_weights.py), where that can be done.

It can where every weight of the module is a tensor of the files, or several that are stacked or joined
(converted_weights.py): what transformers makes in another way on loading is its to load. Knows nothing of splits, nor
of formats: tensors of safetensors, of GGUF, of quantized folders and of parts of larger models are `SavedTensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from doubleweave.sources.converted_weights import Made, made_weights
from doubleweave.sources.file_weights import FileWeight, Opened
from doubleweave.sources.saved_tensors import Saved, SavedTensors, in_float32

# Of all weights in float32. A module that takes less is loaded whole, which is read once and not at every use.
LEAST_BYTES = 3 << 28
# Smaller ones (norms, biases) are loaded: who looks at single numbers does so in them.
_SMALL_BYTES = 1 << 20


def streamed_module(
    kind: Any, config: Any, files: SavedTensors, is_harmless: Callable[[str, tuple[int, ...]], bool]
) -> Any | None:
    """A module of the class `kind` in float32 and eval mode, None where transformers has to load it whole.

    `is_harmless` says which tensors no weight needs to be made of.
    """
    if 4 * sum(_numel(files.shape(name)) for name in files) < LEAST_BYTES:
        return None
    try:
        with _parameters_on_meta():
            module = kind._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception:  # it computes with parameters while it is made
        return None
    named = module.state_dict(keep_vars=True)
    found = made_weights(module, {name: files.shape(name) for name in files}, is_harmless)
    if found is None:
        return None
    names: dict[int, str] = {}  # of each weight that is made; a tied one has several in the module
    for name in found:
        if id(named[name]) in names:  # saved twice: transformers takes one of them
            return None
        names[id(named[name])] = name
    if any(id(weight) not in names for weight in named.values()):
        return None
    made: dict[int, Tensor] = {}
    for weight in named.values():
        if id(weight) not in made:
            name = names[id(weight)]
            made[id(weight)] = _weight(partial(_opened, files, name, found[name], module), weight)
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) in made:
                    held[name] = made[id(tensor)]
    return module


@contextmanager
def _opened(files: SavedTensors, name: str, made: Made, module: Any) -> Iterator[Saved]:
    with files.opened(made.names) as tensors:
        yield made.of(name, tensors, module)


def _weight(opened: Opened, weight: Tensor) -> Tensor:
    is_parameter = isinstance(weight, nn.Parameter)
    made: Tensor
    if is_parameter and 4 * weight.numel() >= _SMALL_BYTES:
        made = FileWeight(opened, tuple(weight.shape))
    else:
        with opened() as saved:
            made = in_float32(saved) if weight.is_floating_point() else saved[:].to(weight.dtype, copy=True)
    return nn.Parameter(made, requires_grad=False) if is_parameter else made


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, a new module's parameters take no memory; buffers, which are computed, do."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
