"""Weights that stay in their files and have an adapter merged into them: peft merges one layer whenever it is read.

Knows nothing of kinds of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from doubleweave.sources.file_weights import FileWeight, in_memory
from doubleweave.sources.saved_tensors import Saved


def file_weights_of(layer: Any) -> dict[str, FileWeight]:
    """By name, those of the layer that peft's `layer` stands around."""
    found = layer.get_base_layer()._parameters.items()
    return {name: weight for name, weight in found if isinstance(weight, FileWeight)}


def merge_when_read(layer: Any) -> None:
    """Give peft's `layer` another `merge`: weights in files become weights that merge when they are read.

    Others change at once. It raises what peft's own raises.
    """
    layer.merge = partial(_merge, layer)


def _merge(layer: Any, **how: Any) -> None:
    base = layer.get_base_layer()
    before = dict(base._parameters)
    found = _merged(layer, before, how)
    for name, parameter in before.items():
        if isinstance(parameter, FileWeight):
            opened = partial(_opened, layer, before, how, name)
            found[name] = nn.Parameter(FileWeight(opened, tuple(parameter.shape)), requires_grad=False)
    base._parameters.update(found)


def copy_of(weight: Tensor) -> Tensor:
    """The same numbers, which nobody writes into beside it."""
    if isinstance(weight, FileWeight):
        return FileWeight(weight.opened, tuple(weight.shape))
    return weight.clone()


@contextmanager
def _opened(layer: Any, before: dict[str, Any], how: dict[str, Any], name: str) -> Iterator[Saved]:
    yield _merged(layer, before, how)[name].detach()


def _merged(layer: Any, before: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """The layer's parameters as peft makes them of those `before`, in memory; the layer is left as it was."""
    base = layer.get_base_layer()
    now, adapters = dict(base._parameters), list(layer.merged_adapters)
    base._parameters.update(
        {
            name: None if one is None else nn.Parameter(in_memory(one.detach()).clone(), requires_grad=False)
            for name, one in before.items()
        }
    )
    layer.merged_adapters = []
    try:
        type(layer).merge(layer, **how)
        return dict(base._parameters)
    finally:
        base._parameters.update(now)
        layer.merged_adapters = adapters
