"""A GGUF file's tensors as the weights of transformers' model: named, ordered and made float32 when they are read.

What happens to a tensor on the way (rows in another order, norms less one, experts joined) is transformers' own code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doubleweave.errors import SourceError
from doubleweave.sources import gguf_rotary
from doubleweave.sources.gguf_file import Array, GgufFile
from doubleweave.sources.saved_tensors import Rows, Saved, SavedTensors

# gguf-py's name of an architecture whose model type in transformers is another.
_NAMED_AS = {"mistral": "llama"}


class GgufTensors(SavedTensors):
    """The weights of `empty`, transformers' module of `config` on the meta device, by its names.

    Raises SourceError unless tensors and weights match one to one.
    """

    def __init__(self, file: GgufFile, config: Any, empty: torch.nn.Module) -> None:
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        makers: Any = TENSOR_PROCESSORS
        self._file = file
        self._processor = makers.get(file.architecture, TensorProcessor)(config=config.to_dict())
        self._names: dict[str, str] = get_gguf_hf_weights_map(
            empty, self._processor, model_type=_NAMED_AS.get(config.model_type)
        )
        self._sources: dict[str, list[str]] = defaultdict(list)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._unchanged: set[str] = set()  # weights that are a tensor as it is in the file
        for name in file.tensors:
            if name not in gguf_rotary.TENSORS:
                self._place(name, type(empty).__name__)
        self._check({name: tuple(value.shape) for name, value in empty.state_dict().items()}, config)

    def _place(self, name: str, model: str) -> None:
        """Note which weights the tensor goes into, seen on numbers of its shape that take no memory."""
        if name not in self._names and name.removesuffix(".weight") not in self._names:
            raise SourceError(
                f"{self._file.path}: found the tensor {name}, which {model} has no weight for; use the model's Hugging "
                "Face folder"
            )
        # Negative, because the numbers of a state-space model's A are.
        given = np.broadcast_to(np.int8(-1), self._file.shape(name))
        gathered: dict[str, Tensor] = {}
        weight, made = self._processed(gathered, name, given)
        shapes = {key: tuple(tensor.shape) for key, tensor in gathered.items()}
        if weight is not None:
            shapes[weight] = made.shape
            if made is given:
                self._unchanged.add(weight)
        for key, shape in shapes.items():
            self._sources[key].append(name)
            self._shapes[key] = shape

    def _processed(self, gathered: dict[str, Tensor], name: str, numbers: Array) -> tuple[str | None, Array]:
        """The weight that the tensor's numbers are, and these numbers; None where they went into those `gathered`."""
        made = self._processor.process(
            weights=numbers,
            name=name,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": gathered, "config": {}},
        )
        return None if made.name is None else self._names[made.name], made.weights

    def _check(self, wanted: dict[str, tuple[int, ...]], config: Any) -> None:
        file = self._file
        for weight, shape in self._shapes.items():
            if wanted.get(weight) != shape:
                raise SourceError(
                    f"{file.path}: {weight} has the shape {list(shape)}, expected {list(wanted.get(weight, ()))} from "
                    "the file's keys; fetch the file again"
                )
            found = sum(math.prod(file.shape(source)) for source in self._sources[weight])
            if found != math.prod(shape):  # a half of it is missing, or another tensor is this weight as well
                raise SourceError(
                    f"{file.path}: {', '.join(self._sources[weight])} have {found} numbers for {weight}, expected "
                    f"{math.prod(shape)}; fetch the file, and all its parts, again"
                )
        tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
        missing = [weight for weight in wanted if weight not in self._shapes and weight not in tied]
        if missing:
            more = f" and {len(missing) - 5} others" if len(missing) > 5 else ""
            raise SourceError(
                f"{file.path}: has no tensors for {', '.join(missing[:5])}{more}; fetch the file, and all its parts, "
                "again"
            )

    def __getitem__(self, name: str) -> Tensor:
        with self.opened([name]) as (saved,):
            return saved.whole() if isinstance(saved, Rows) else saved

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return ", ".join(self._file.tensors[source].tensor_type.name for source in self._sources[name])

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Saved]]:
        """Rows, dequantized when they are asked for, where the processor takes them alone; whole tensors elsewhere."""
        yield [self._rows(name) if self._has_rows(name) else self._whole(name) for name in names]

    def _has_rows(self, name: str) -> bool:
        if name in self._unchanged:
            return len(self._shapes[name]) > 1
        # Experts, which lie along the first axis: seen on three small ones.
        sources = self._sources[name]
        if any(len(self._file.shape(source)) < 3 for source in sources):
            return False
        numbers = np.random.default_rng(0).standard_normal((len(sources), 3, 2, 2), np.float32)
        given = dict(zip(sources, numbers, strict=True))
        try:
            parts = [
                self._joined(name, {source: one[n : n + 1] for source, one in given.items()})
                for n in range(3)
            ]
            return torch.equal(torch.cat(parts), self._joined(name, given))
        except (ValueError, IndexError, RuntimeError):  # it counts on the model's sizes
            return False

    def _whole(self, name: str) -> Tensor:
        return self._joined(name, {source: self._file.weights(source) for source in self._sources[name]})

    def _rows(self, name: str) -> Rows:
        read = {source: self._file.numbers(source) for source in self._sources[name]}

        def compute(rows: slice | Tensor) -> Tensor:
            index = rows.numpy() if isinstance(rows, Tensor) else rows
            return self._joined(name, {source: numbers(index) for source, numbers in read.items()})

        return Rows(self._shapes[name], compute)

    def _joined(self, name: str, numbers: Mapping[str, Array]) -> Tensor:
        """The weight `name`, made of the numbers of each of its tensors."""
        gathered: dict[str, Tensor] = {}
        for source, found in numbers.items():
            weight, made = self._processed(gathered, source, found)
            if weight is not None:
                gathered[weight] = torch.from_numpy(np.ascontiguousarray(made))
        return gathered[name]
