"""Dynamic dims of a module's arguments, as `torch.export` writes them: matched with the arguments, checked, named.

It knows nothing of policies' keys or of graphs beyond the sizes of their inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from doubleweave.errors import PolicyError
from doubleweave.ir.interface import Parameter
from doubleweave.ir.trees import Tree

# Sizes to export with: all different, so that no two dims look equal by chance.
_EXAMPLES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)

# The largest size of a dim: a dynamic method plans its memory for it.
_MOST = 2**24

Axes = dict[int, Any]  # axis -> Dim or DimHint


@dataclass(frozen=True)
class Leaf:
    """One input tensor: its path in the arguments, an example and its dynamic axes.

    `given` are the sizes of the user's own argument, where the example has others.
    """

    path: str
    example: Tensor
    axes: Axes
    given: tuple[int, ...] | None = None


def leaves(
    what: str, parameters: Sequence[Parameter], tensors: Sequence[Tensor], dims: Any
) -> tuple[Leaf, ...]:
    """Match dims, by name or position, with the tensors of the arguments.

    Raises PolicyError for dims of an argument or axis that does not exist, and for values that are no dims.
    """
    given = [p for p in parameters if p.tree is not None]
    if dims is None:
        dims = {}
    if isinstance(dims, (tuple, list)):
        if len(dims) > len(given):
            raise PolicyError(
                f"{what}: found dims for {len(dims)} arguments, expected at most {len(given)}: "
                f"{', '.join(p.name for p in given)}"
            )
        dims = {p.name: value for p, value in zip(given, dims, strict=False)}
    if not isinstance(dims, Mapping):
        raise PolicyError(f"{what}: found dims {dims!r}, expected a dict by argument or a tuple by position")
    unknown = set(dims) - {p.name for p in given}
    if unknown:
        raise PolicyError(
            f"{what}: dims name argument {sorted(map(str, unknown))[0]!r}, expected one of "
            f"{', '.join(p.name for p in given) or '(none)'}"
        )
    rest = list(tensors)
    found: list[Leaf] = []
    for p in given:
        assert p.tree is not None
        found += _match(what, p.tree, dims.get(p.name), p.name, rest)
    return tuple(found)


def _match(what: str, tree: Tree, dims: Any, path: str, rest: list[Tensor]) -> list[Leaf]:
    if tree.kind == "tensor":
        tensor = rest.pop(0)
        return [Leaf(path, tensor, _axes(what, dims, path, tensor))]
    if tree.kind == "constant":
        if dims:
            raise PolicyError(f"{what}: dims of {path}, which is the constant {tree.value!r} and has no axes")
        return []
    if dims is None:
        dims = [None] * len(tree.items)
    keys: Sequence[Any] = tree.keys or range(len(tree.items))
    if isinstance(dims, Mapping):
        dims = [dims.get(key) for key in keys] if set(dims) <= set(keys) else None
    if not isinstance(dims, (tuple, list)) or len(dims) != len(tree.items):
        raise PolicyError(
            f"{what}: the dims of {path} are not built like it, a {tree.kind} of {len(tree.items)}"
        )
    found: list[Leaf] = []
    for key, item, inner in zip(keys, tree.items, dims, strict=True):
        found += _match(what, item, inner, f"{path}[{key!r}]", rest)
    return found


def _axes(what: str, dims: Any, path: str, tensor: Tensor) -> Axes:
    rank = tensor.ndim
    if isinstance(dims, (tuple, list)):
        if len(dims) != rank:
            raise PolicyError(f"{what}: found {len(dims)} dims for {path}, which has {rank} axes")
        dims = dict(enumerate(dims))
    if dims is None:
        return {}
    if not isinstance(dims, Mapping):
        raise PolicyError(f"{what}: found dims {dims!r} for {path}, expected {{axis: Dim}}")
    axes: Axes = {}
    for axis, dim in dims.items():
        if type(axis) is not int or not -rank <= axis < rank:
            raise PolicyError(f"{what}: {path} has no axis {axis!r}; it has {rank}, 0 to {rank - 1}")
        if isinstance(dim, int) and dim != tensor.shape[axis]:
            raise PolicyError(
                f"{what}: axis {axis} of {path} is {tensor.shape[axis]}, and its dim says {dim}; give it a "
                "Dim, or leave it out"
            )
        # torch.export takes an int, None and Dim.STATIC for a fixed size.
        if dim is None or isinstance(dim, int) or dim is Dim.STATIC:
            continue
        if not isinstance(dim, (Dim, type(Dim.AUTO))):
            raise PolicyError(
                f"{what}: axis {axis} of {path} has dim {dim!r}, expected torch.export.Dim(name, min=…, max=…)"
            )
        if isinstance(dim, Dim):
            _check_bounds(what, dim)
        axes[axis % rank] = dim
    return axes


def _check_bounds(what: str, dim: Any) -> None:
    if not isinstance(dim.max, int):
        raise PolicyError(
            f"{what}: dim {dim.__name__!r} has no largest size, and a dynamic method is planned for one; write "
            f"Dim({dim.__name__!r}, min=…, max=…)"
        )
    if dim.max > _MOST:
        raise PolicyError(f"{what}: dim {dim.__name__!r} goes up to {dim.max}, expected at most {_MOST}")
    if dim.min < 1:
        raise PolicyError(f"{what}: dim {dim.__name__!r} begins at {dim.min}, expected at least 1")


def axis_name(path: str, axis: int) -> str:
    """The name of an axis without a Dim: "xs_0__1" for axis 1 of "xs[0]"."""
    return "".join(c if c.isalnum() else "_" for c in path) + f"_{axis}"


def with_examples(found: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Give every named dim an example size of its own, of at least 2: torch takes a 1 for a constant."""
    sizes: dict[str, int] = {}
    result = []
    for leaf in found:
        shape = list(leaf.example.shape)
        for axis, dim in leaf.axes.items():
            if isinstance(dim, Dim):
                root: Any = getattr(dim, "root", dim)  # of 2*k, k has the example size
                if root.__name__ not in sizes:
                    sizes[root.__name__] = _example(root, set(sizes.values()))
                number = sizes[root.__name__]
                shape[axis] = number if root is dim else int(getattr(dim, "fn")(number))  # noqa: B009  derived dims only
        example = torch.zeros(shape, dtype=leaf.example.dtype)
        result.append(Leaf(leaf.path, example, leaf.axes, tuple(leaf.example.shape)))
    return tuple(result)


def _example(dim: Any, taken: set[int]) -> int:
    low: int = max(2, dim.min)
    high: int = dim.max
    options = (low - 2 + n for n in _EXAMPLES if low - 2 + n <= high and low - 2 + n not in taken)
    return next(options, max(low, min(high, low + 1)))


def text(paths: Sequence[str], axes: Sequence[Mapping[int, str]]) -> str:
    """Dims in the notation of `dynamic_shapes`: {"a": {0: m, 1: k}}."""
    nested: dict[str, Any] = {}
    for path, named in zip(paths, axes, strict=True):
        if not named:
            continue
        inner = nested
        for step in re.findall(r"[^][.]+", path):  # of "xs[0]['a']" or "config.scale"
            inner = inner.setdefault(step if step.isdigit() or step[0] == "'" else f'"{step}"', {})
        inner.update({str(axis): name for axis, name in named.items()})
    return _text(nested)


def _text(nested: dict[str, Any]) -> str:
    parts = (f"{key}: {_text(value) if isinstance(value, dict) else value}" for key, value in nested.items())
    return "{" + ", ".join(parts) + "}"
