"""The states of a language model: tensors of fixed size that a layer hands from one token to the next.

They are found in how the model uses its own cache object (transformers' `Cache`: convolutions and recurrences), not by
class. The modules that use them are exported as the model's own step for one token, with the tokens of a chunk as its
batch: rows of a batch never meet, so all that is no recurrence is row by row by construction, and what lies between a
state and its next value is the recurrence (recurrence.py). This module knows nothing of segments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from doubleweave.compiler.graph.own_states import Place, note_calls, numbered, own_states
from doubleweave.compiler.graph.refusal_causes import watching
from doubleweave.errors import SplitError

_KINDS = ("conv", "recurrent")
_USES = tuple(f"{verb}_{kind}_state" for verb in ("get", "update") for kind in _KINDS)


class Key(NamedTuple):
    """A state by the model's own numbers: the layer, and which of its states."""

    layer: int
    kind: str
    number: int

    @property
    def name(self) -> str:
        """As it is called in a program: "conv_0", or "conv_0_1" for a layer's second."""
        return f"{self.kind}_{self.layer}" + (f"_{self.number}" if self.number else "")


@dataclass(frozen=True)
class States:
    """What a model keeps between tokens beside rows of keys and values.

    `shapes` are the sizes for one sequence, without the batch; `users` the modules that read and write them; `places`
    where they are, if not in transformers' cache layers.
    """

    shapes: Mapping[Key, tuple[int, ...]]
    users: tuple[nn.Module, ...]
    places: Mapping[Key, Place] = field(default_factory=dict)


def takes_cache_as(model: nn.Module) -> str:
    """The parameter by which a model takes its cache."""
    parameters = inspect.signature(model.forward).parameters
    return "cache_params" if "cache_params" in parameters else "past_key_values"


def find_states(model: Any) -> States:
    """The states of a model and the modules that use them, found by running it over two tokens.

    Raises SplitError for a module that keeps states and attends as well.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    own = own_states(model, takes_cache_as(model))
    if own.states:
        numbers = numbered(tuple(own.states), model)
        places = {
            Key(number, place.name, 0): place for number, place in zip(numbers, own.states, strict=True)
        }
        shapes = {key: tuple(own.states[place].shape[1:]) for key, place in places.items()}
        return States(shapes, own.users, places)
    try:
        cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    except Exception:  # a config of which transformers makes no cache: the model keeps nothing there
        return States({}, ())
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return States({}, ())
    users: dict[nn.Module, None] = {}
    attending: set[nn.Module] = set()
    with watching(model) as watch:
        for name in _USES:
            note_calls(cache, name, lambda: users.setdefault(watch.running))
        note_calls(cache, "update", lambda: attending.add(watch.running))
        ids = torch.zeros(1, 2, dtype=torch.long)
        try:
            with torch.no_grad():
                model(input_ids=ids, use_cache=True, **{takes_cache_as(model): cache})
        except Exception as error:
            raise SplitError(
                f"{type(model).__name__}: does not run over two tokens with transformers' cache "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}): expected a decoder that keeps "
                "its states there; this architecture is not supported"
            ) from error
    if both := next((module for module in users if module in attending), None):
        raise SplitError(
            f"{type(both).__name__} keeps states and attends in one module: expected one module for each; this "
            "architecture is not supported"
        )
    return States({key: tuple(state.shape[1:]) for key, state in states_in(cache)}, tuple(users))


def states_in(cache: Any) -> Iterator[tuple[Key, Tensor]]:
    """The states that a transformers cache holds, each [batch, …]."""
    for number, layer in enumerate(cache.layers):
        for kind in _KINDS:
            held = getattr(layer, f"{kind}_states", None) or ()
            for index, state in held.items() if isinstance(held, dict) else enumerate(held):
                if isinstance(state, Tensor):
                    yield Key(number, kind, index), state


@contextmanager
def one_step_a_row(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within, these modules take the rows of a chunk, [1, T, …], as a batch of single tokens, [T, 1, …]."""
    for module in modules:
        module.forward = _of_rows(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # of the instance; the class's is there again


def _of_rows(forward: Any) -> Any:
    def swapped(value: Any, is_given: bool) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(swapped(item, is_given) for item in value)
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        # T is a symbol in an export; tensors without rows (weights that layers share) stay as they are.
        has_rows = value.shape[0] == 1 and not isinstance(value.shape[1], int) if is_given else True
        return value.transpose(0, 1) if has_rows else value

    def run(*args: Any, **kwargs: Any) -> Any:
        given = {name: swapped(value, True) for name, value in kwargs.items()}
        return swapped(forward(*(swapped(value, True) for value in args), **given), False)

    return run


def make_cache(config: Any, states: Mapping[Key, Tensor]) -> Any:
    """A transformers cache for one step, behind tokens that are not there: `now` has the states, [batch, …] each.

    Keys and values are given back as they come: attention adds the cached rows by itself (export_llm.py).
    """
    from transformers import DynamicCache

    class StepCache(DynamicCache):
        def __init__(self) -> None:
            super().__init__(config=config)
            self.now = dict(states)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

        def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
            return True

        def is_recording_past(self, layer_idx: int) -> bool:
            return False

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            return key_states, value_states

        def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
            return self.now[Key(layer_idx, "conv", state_idx)]

        def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
            return self.now[Key(layer_idx, "recurrent", state_idx)]

        def update_conv_state(
            self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
        ) -> Tensor:
            key = Key(layer_idx, "conv", state_idx)
            whole = torch.cat((self.now[key], conv_states), dim=-1)
            self.now[key] = whole[..., -self.now[key].shape[-1] :]
            return whole

        def update_recurrent_state(
            self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
        ) -> Tensor:
            self.now[Key(layer_idx, "recurrent", state_idx)] = recurrent_states
            return recurrent_states

    return StepCache()
