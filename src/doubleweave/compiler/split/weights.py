"""The weights of a split's segments, made when somebody asks for them.

A split that is quantized and rewritten for its backends has the functions that make its weights from those of the split
before it. So the weights of all segments are never there at once, in a form in which they are only read on the way to a
file. Knows nothing of graphs or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

Weights = tuple[Tensor, ...]
# Turns a segment's old weights into the new graph's.
Convert = Callable[[Weights], Weights]

# What is made is kept up to so many bytes: weights of small models are asked for several times.
_KEPT_BYTES = 160 << 20


class MadeWeights(Mapping[str, Weights]):
    """By segment, `convert` of the weights that `source` has of it; of a segment without one, those."""

    def __init__(self, source: Mapping[str, Weights], convert: Mapping[str, Convert]) -> None:
        self._source, self._convert = source, convert
        self._kept: dict[str, Weights] = {}
        self._room = _KEPT_BYTES

    def __getitem__(self, name: str) -> Weights:
        found = self.made(name, _as_it_is)
        size = sum(tensor.nbytes for tensor in found)
        if name in self._convert and name not in self._kept and size <= self._room:
            self._kept[name] = found
            self._room -= size
        return found

    def made(self, name: str, of: Callable[[Tensor], Tensor]) -> Weights:
        """A segment's weights, made of what `of` gives for those that they are made from; what is made of them on the
        way is not kept."""
        if name in self._kept and of is _as_it_is:
            return self._kept[name]
        found = _made(self._source, name, of)
        return self._convert[name](found) if name in self._convert else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


class JoinedWeights(Mapping[str, Weights]):
    """The weights of several splits: of each segment by its name, behind the name of its split and a dot ("": none)."""

    def __init__(self, parts: Mapping[str, Mapping[str, Weights]]) -> None:
        self._places = {
            f"{split}.{name}" if split else name: (part, name)
            for split, part in parts.items()
            for name in part
        }

    def __getitem__(self, name: str) -> Weights:
        part, own = self._places[name]
        return part[own]

    def made(self, name: str, of: Callable[[Tensor], Tensor]) -> Weights:
        part, own = self._places[name]
        return _made(part, own, of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def without_numbers(weights: Mapping[str, Weights], name: str, least_bytes: int) -> Weights:
    """A segment's weights, of which those that are made from so many bytes are fake: only their shapes are known."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        if tensor.nbytes < least_bytes:
            return tensor
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

    return _made(weights, name, fake)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _made(weights: Mapping[str, Weights], name: str, of: Callable[[Tensor], Tensor]) -> Weights:
    if isinstance(weights, (MadeWeights, JoinedWeights)):
        return weights.made(name, of)
    return tuple(map(of, weights[name]))
