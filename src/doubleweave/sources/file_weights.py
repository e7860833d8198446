"""Weights that stay in their files: tensors of float32 whose numbers are read whenever they are computed with.

A module of such weights runs like any other, a split's functions take them like any other, and none of it is in memory
for longer than an operator needs it. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from doubleweave.errors import SourceError
from doubleweave.sources.saved_tensors import Rows, Saved, in_float32

# Output features of a product that are computed at a time.
FEATURES = 4096
aten = torch.ops.aten

# Gives a weight as it is in its file, for as long as the context lasts.
Opened = Callable[[], AbstractContextManager[Saved]]


class FileWeight(Tensor):
    """A float32 weight of `shape` that `opened` finds in a file, in whatever dtype."""

    opened: Opened

    @staticmethod
    def __new__(cls, opened: Opened, shape: tuple[int, ...]) -> FileWeight:
        made: FileWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)
        made.opened = opened
        return made

    def __init__(self, opened: Opened, shape: tuple[int, ...]) -> None:
        pass

    def read(self) -> Tensor:
        """All of it, float32."""
        with self.opened() as saved:
            return in_float32(saved)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """Float32 [rows, …] behind one another, each in the place of the one before; the last may have fewer."""
        memory = torch.empty(min(rows, self.shape[0]), *self.shape[1:])
        with self.opened() as saved:
            for start in range(0, self.shape[0], rows):
                block = saved[start : start + rows]
                yield memory[: len(block)].copy_(block)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Some output features at a time: the weights of a head are the largest that there are.
        is_linear = func in (functional.linear, aten.linear.default) and not kwargs
        if is_linear and [isinstance(tensor, FileWeight) for tensor in args] in (
            [False, True],
            [False, True, False],
        ):
            return linear_in_blocks(args[0], args[1].blocks(FEATURES), len(args[1]), *args[2:])
        # A tensor's own would make results file weights as well.
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (aten.detach.default, aten.alias.default):
            return args[0]
        if func is aten.embedding.default and isinstance(args[0], FileWeight):
            with args[0].opened() as saved:  # of a table these rows alone
                return saved[args[1]].to(torch.float32)
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if isinstance(given, FileWeight) and argument.is_write:  # it would write into a copy
                raise SourceError(
                    f"{func}: a weight that stays in its file cannot be written; load the model whole"
                )
        args, kwargs = pytree.tree_map_only(FileWeight, lambda weight: weight.read(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FileWeight({tuple(self.shape)})"


def linear_in_blocks(
    x: Tensor, blocks: Iterable[Tensor], features: int, bias: Tensor | None = None
) -> Tensor:
    """`linear` over a weight that comes in blocks of its `features` output features, [rows, K] each."""
    result, start = x.new_empty(*x.shape[:-1], features), 0
    for block in blocks:
        end = start + len(block)
        result[..., start:end] = functional.linear(x, block, None if bias is None else bias[start:end])
        start = end
    return result


def in_blocks(weight: Tensor, rows: int) -> Iterator[Tensor]:
    """A weight's rows, so many behind one another; each block in the place of the one before, where they are read."""
    return weight.blocks(rows) if isinstance(weight, FileWeight) else iter(torch.split(weight.detach(), rows))


def computed_rows(weight: Tensor, compute: Callable[[Tensor, slice | Tensor], Tensor]) -> Tensor:
    """`compute` of a weight's rows, float32, and which they are; of one in a file whenever they are read."""
    if not isinstance(weight, FileWeight):
        return compute(weight.detach(), slice(None))
    shape = tuple(weight.shape)
    return _changed(
        weight, shape, lambda saved: Rows(shape, lambda some: compute(saved[some].to(torch.float32), some))
    )


def transposed(weight: Tensor) -> Tensor:
    """[K, N] -> [N, K]; of a weight in a file whenever it is read."""
    if not isinstance(weight, FileWeight):
        return weight.detach().t()
    return _changed(weight, (weight.shape[1], weight.shape[0]), lambda saved: saved[:].t())


def sliced(weight: Tensor, places: tuple[slice, ...]) -> Tensor:
    """`weight[places]`, of its first axis or its first two; a matrix in a file is read whenever it is needed."""
    if not isinstance(weight, FileWeight) or weight.ndim == 1:
        return in_memory(weight).detach()[places].clone()
    ranges = [range(size)[place] for size, place in zip(weight.shape, places, strict=False)]
    shape = (*map(len, ranges), *weight.shape[len(ranges) :])
    rows, behind = places[0], (slice(None), *places[1:])
    return _changed(weight, shape, lambda saved: saved[rows][behind])


def _changed(weight: FileWeight, shape: tuple[int, ...], change: Callable[[Saved], Saved]) -> FileWeight:
    """A weight that is `change` of what another has in its file."""

    @contextmanager
    def opened() -> Iterator[Saved]:
        with weight.opened() as saved:
            changed = change(saved)
            yield Rows(shape, lambda some: changed[some].to(torch.float32))

    return FileWeight(opened, shape)


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor, read where it is in a file."""
    return tensor.read() if isinstance(tensor, FileWeight) else tensor


@contextmanager
def stand_ins(module: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """Inside, memory that is never touched stands in for the module's file weights, for who traces it and reads none.

    Gives a function that puts the file weights into another module in the place of their stand-ins.
    """
    weights = {id(weight): weight for weight in module.parameters() if isinstance(weight, FileWeight)}
    made = {key: torch.empty(weight.shape) for key, weight in weights.items()}
    # By address: what is traced holds them as tensors of its own.
    by_address = {tensor.data_ptr(): weights[key] for key, tensor in made.items()}

    def put_back(other: nn.Module) -> None:
        _replace(other, lambda found: by_address.get(found.data_ptr()))

    _replace(module, lambda found: made.get(id(found)))
    try:
        yield put_back
    finally:
        put_back(module)


def _replace(module: nn.Module, replacement: Callable[[Tensor], Tensor | None]) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            new = None if parameter is None else replacement(parameter)
            if new is not None:
                part._parameters[name] = nn.Parameter(new, requires_grad=False)
