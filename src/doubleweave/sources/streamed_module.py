"""Make a transformers module of a folder whose weights stay in the files (file_weights.py), where that can be done.

It can where every weight of the module is a tensor of the files under its own name: what transformers renames, stacks
or computes on loading is its to load. Knows nothing of splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from doubleweave.sources.file_weights import FileWeight
from doubleweave.sources.tensor_files import TensorFiles

# Of all weights in float32. A module that takes less is loaded whole, which is read once and not at every use.
LEAST_BYTES = 1 << 30
# Smaller ones (norms, biases) are loaded: who looks at single numbers does so in them.
_SMALL_BYTES = 1 << 20


def streamed_module(
    kind: Any, config: Any, files: TensorFiles, is_harmless: Callable[[str, tuple[int, ...]], bool]
) -> Any | None:
    """A module of the class `kind` in float32 and eval mode, None where transformers has to load it whole.

    `is_harmless` says which tensors no weight needs to be made of.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if 4 * sum(_numel(files.shape(name)) for name in files) < LEAST_BYTES:
        return None
    try:
        with _parameters_on_meta():
            module = kind._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception:  # it computes with parameters while it is made
        return None
    if get_model_conversion_mapping(module, add_legacy=False):
        return None
    named = module.state_dict(keep_vars=True)
    names: dict[int, str] = {}  # of each weight in the files; a tied one has several in the module
    for name, weight in named.items():
        if name in files and files.shape(name) == tuple(weight.shape):
            if id(weight) in names:  # saved twice: transformers takes one of them
                return None
            names[id(weight)] = name
    if any(id(weight) not in names for weight in named.values()):
        return None
    if any(name not in named and not is_harmless(name, files.shape(name)) for name in files):
        return None
    made: dict[int, Tensor] = {}
    for weight in named.values():
        if id(weight) not in made:
            made[id(weight)] = _weight(files, names[id(weight)], weight)
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, found in held.items():
                if found is not None and id(found) in made:
                    held[name] = made[id(found)]
    return module


def _weight(files: TensorFiles, name: str, weight: Tensor) -> Tensor:
    is_parameter = isinstance(weight, nn.Parameter)
    made: Tensor
    if is_parameter and 4 * weight.numel() >= _SMALL_BYTES:
        made = FileWeight(partial(files.opened, name), tuple(weight.shape))
    else:
        made = files[name].to(torch.float32 if weight.is_floating_point() else weight.dtype, copy=True)
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
