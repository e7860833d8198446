"""States that a model keeps elsewhere than in transformers' cache layers: in its modules, or in a cache of its own.

A module's state is an attribute, named as one, that is a tensor behind a run with a cache (RecurrentGemma); a cache's
is a tensor in a list (MiniMax). Both are found by running the model. This module knows nothing of graphs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doubleweave.compiler.graph.refusal_causes import watching

_NAMED = re.compile(r".*states?")


class Place(NamedTuple):
    """Where a state is: an attribute of a module, or (None) an entry of a list of the cache."""

    module: nn.Module | None
    name: str
    entry: int


class OwnStates(NamedTuple):
    """The places of the states with their tensors, [1, …], and the modules that read and write them."""

    states: dict[Place, Tensor]
    users: tuple[nn.Module, ...]


def own_states(model: Any, cache_name: str) -> OwnStates:
    """Empty for a model that keeps its states in transformers' cache layers, or none."""
    held = [
        Place(module, name, 0)
        for module in model.modules()
        for name, value in vars(module).items()
        if (value is None or isinstance(value, Tensor)) and _NAMED.fullmatch(name)
    ]
    kind = _own_cache(model)
    if not held and kind is None:
        return OwnStates({}, ())
    before = {place: getattr(place.module, place.name) for place in held}
    users: dict[nn.Module, None] = {}
    with watching(model) as watch, torch.no_grad():
        given: dict[str, Any] = {} if kind is None else {cache_name: _noting(kind, watch, users)}
        try:
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True, **given)
        except Exception:  # it takes no cache so; what it keeps is not known
            return OwnStates({}, ())
        finally:
            found = {place: getattr(place.module, place.name) for place in held}
            for place, value in before.items():
                setattr(place.module, place.name, value)
    states = {place: value for place, value in found.items() if isinstance(value, Tensor)}
    owners = dict.fromkeys(place.module for place in states)
    users |= {
        module: None
        for module in owners
        if module is not None
        and not any(module in set(other.modules()) - {other} for other in owners if other)
    }
    for name, value in vars(given[cache_name]).items() if given else ():
        for index, state in enumerate(value if isinstance(value, list) else ()):
            if isinstance(state, Tensor):
                states[Place(None, name, index)] = state
    return OwnStates(states, tuple(users))


def _own_cache(model: Any) -> Any:
    """The class of caches that the model's own file defines, None without one."""
    from transformers import Cache

    file = type(model).__module__
    classes = (found for found in vars(sys.modules[file]).values() if isinstance(found, type))
    return next((found for found in classes if issubclass(found, Cache) and found.__module__ == file), None)


def _noting(kind: Any, watch: Any, users: dict[nn.Module, None]) -> Any:
    """A cache whose own methods note the module that calls them."""
    cache = kind()
    for name, method in vars(kind).items():
        if not name.startswith("_") and callable(method):
            note_calls(cache, name, lambda: users.setdefault(watch.running))
    return cache


def note_calls(cache: Any, name: str, note: Any) -> None:
    """Call `note` before each call of a method of the cache."""
    method = getattr(cache, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        note()
        return method(*args, **kwargs)

    setattr(cache, name, noting)


@contextmanager
def holding(
    model: Any, states: Mapping[Place, Tensor], cache: Any
) -> Iterator[tuple[Any, dict[Place, Tensor]]]:
    """Within, the states are at their places: yields the cache to run the model with, and, once it ran, what is there.

    `cache` is one of transformers' that gives keys and values back as they come.
    """
    kind = _own_cache(model)
    if kind is not None and any(place.module is None for place in states):
        own = kind()
        step: Any = type("OwnStepCache", (type(cache), kind), {})
        both = step.__new__(step)
        vars(both).update(vars(cache) | vars(own))
        vars(both)["layers"] = cache.layers
        for name in {place.name for place in states if place.module is None}:
            entries = {place.entry: state for place, state in states.items() if place.name == name}
            setattr(both, name, [entries.get(index, []) for index in range(max(entries) + 1)])
        cache = both
    before = {place: getattr(place.module, place.name) for place in states if place.module is not None}
    for place in before:
        setattr(place.module, place.name, states[place])
    after: dict[Place, Tensor] = {}
    try:
        yield cache, after
    finally:
        for place in states:
            if place.module is None:
                after[place] = getattr(cache, place.name)[place.entry]
            else:
                after[place] = getattr(place.module, place.name)
                setattr(place.module, place.name, before[place])


def numbered(places: Sequence[Place], model: nn.Module) -> list[int]:
    """A number for each place: the entry of a list, or that of the module among all."""
    modules = {id(module): number for number, module in enumerate(model.modules())}
    return [place.entry if place.module is None else modules[id(place.module)] for place in places]
