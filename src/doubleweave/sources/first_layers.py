"""A model's first layers: the same module with the others taken out for a while.

What is the same in every layer is seen in a few of them; a model that is larger than memory is too large to run whole
more often than once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn


class _Layers(NamedTuple):
    owner: nn.Module  # of the list
    name: str
    members: tuple[nn.Module, ...]
    config: Any


def enough_layers(module: nn.Module) -> int | None:
    """How many of the first layers are of every kind, have every kind of neighbour and end as the model does.

    None where that takes more than half of them, or where the layers are not one list.
    """
    found = _layers(module)
    if found is None:
        return None
    kinds = [_kind(layer, number, found.config) for number, layer in enumerate(found.members)]
    pairs = set(pairwise(kinds))
    for count in range(2, len(kinds) // 2 + 1):
        if set(pairwise(kinds[:count])) == pairs and kinds[count - 1] == kinds[-1]:
            return count
    return None


@contextmanager
def first_layers(module: nn.Module, count: int) -> Iterator[None]:
    """Meanwhile the module has its first `count` layers, and its config speaks of so many."""
    found = _layers(module)
    assert found is not None
    config, number = found.config, len(found.members)
    lists = {name: value for name, value in vars(config).items() if _is_by_layer(value, number)}
    found.owner._modules[found.name] = nn.ModuleList(found.members[:count])
    config.num_hidden_layers = count
    for name, value in lists.items():
        setattr(config, name, value[:count])
    try:
        yield
    finally:
        found.owner._modules[found.name] = nn.ModuleList(found.members)
        config.num_hidden_layers = number
        for name, value in lists.items():
            setattr(config, name, value)


def _layers(module: nn.Module) -> _Layers | None:
    config: Any = getattr(module, "config", None)
    if config is None:
        return None
    config = config.get_text_config(decoder=True)
    number = getattr(config, "num_hidden_layers", None)
    lists = [
        _Layers(owner, name, tuple(part), config)
        for owner in module.modules()
        for name, part in owner.named_children()
        if isinstance(part, nn.ModuleList) and len(part) == number
    ]
    return lists[0] if len(lists) == 1 else None


def _kind(layer: nn.Module, number: int, config: Any) -> str:
    """All that tells a layer from another: settings, shapes, and what the config says of it; no numbers of layers."""
    parts = [
        [value[number] for value in vars(config).values() if _is_by_layer(value, config.num_hidden_layers)]
    ]
    for name, part in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, (str, int, float, type(None))) and not key.startswith("layer_i")
        }
        shapes = {key: tuple(tensor.shape) for key, tensor in part.named_parameters(recurse=False)}
        parts.append([name, type(part).__name__, sorted(settings.items()), sorted(shapes.items())])
    return repr(parts)


def _is_by_layer(value: Any, number: int) -> bool:
    return isinstance(value, list) and len(value) == number
