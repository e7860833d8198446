"""Arguments and results as trees: tuples, lists, dicts, named tuples and dataclasses of tensors and constants.

A tree is plain data, so that a program takes and returns its module's own containers without torch: classes are found
again among the modules that the caller has imported. Anything that has `__dlpack__` is a tensor, so this file needs
neither torch nor numpy.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, get_args

Kind = Literal["tensor", "constant", "tuple", "list", "dict", "named_tuple", "dataclass"]
_LEAVES = ("tensor", "constant")
_RECORDS = ("named_tuple", "dataclass")
_KEYED = ("dict", *_RECORDS)
CONSTANTS = (bool, int, float, str, type(None))
ALLOWED = "tensors, numbers, strings, None, and tuples, lists, dicts, named tuples and dataclasses of them"


@dataclasses.dataclass(frozen=True)
class Tree:
    """One node. `keys` are dict keys or field names, `type` is "module:Class", `value` a constant's."""

    kind: Kind
    items: tuple[Tree, ...] = ()
    keys: tuple[Any, ...] = ()
    type: str = ""
    value: Any = None

    def to_dict(self) -> dict[str, Any]:
        items = [item.to_dict() for item in self.items]
        data = {"kind": self.kind, "items": items, "keys": list(self.keys), "type": self.type}
        found = {key: value for key, value in data.items() if value}
        return found | {"value": self.value} if self.kind == "constant" else found

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Tree:
        """Parse the data of `to_dict`; raises KeyError, TypeError or ValueError for anything else."""
        items = tuple(Tree.from_dict(item) for item in data.get("items", ()))
        tree = Tree(
            **{**data, "items": items, "keys": tuple(data.get("keys", ())), "value": data.get("value")}
        )
        is_leaf, has_keys = tree.kind in _LEAVES, tree.kind in _KEYED
        if (
            tree.kind not in get_args(Kind)
            or (is_leaf and (items or tree.keys))
            or (has_keys and (len(items) != len(tree.keys) or len(set(tree.keys)) != len(tree.keys)))
            or (not has_keys and tree.keys)
            or (tree.kind in _RECORDS and not (tree.type and all(type(key) is str for key in tree.keys)))
            or type(tree.type) is not str
            or type(tree.value) not in CONSTANTS
        ):
            raise ValueError(f"{data!r} is no tree")
        return tree

    @property
    def num_tensors(self) -> int:
        return 1 if self.kind == "tensor" else sum(item.num_tensors for item in self.items)

    def paths(self, where: str) -> Iterator[str]:
        """The path of each tensor: "cfg.mask", "xs[1]", …"""
        if self.kind == "tensor":
            yield where
        for step, item in zip(_steps(self.kind, self.keys, len(self.items)), self.items, strict=True):
            yield from item.paths(where + step)


class TreeError(ValueError):
    """The value at `where` in an argument is of a type that no tree holds, or is not the expected value."""

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(f"{where}: found {found}, expected {expected}")
        self.where, self.found, self.expected = where, found, expected


def is_tensor(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not isinstance(value, type)


def flatten(value: Any, where: str) -> tuple[Tree, list[Any]]:
    """The tree of a value and its tensors in order. Raises TreeError for a type that no tree holds."""
    leaves: list[Any] = []
    return _flatten(value, where, leaves), leaves


def _flatten(value: Any, where: str, leaves: list[Any]) -> Tree:
    if is_tensor(value):
        leaves.append(value)
        return Tree("tensor")
    if type(value) in CONSTANTS:
        return Tree("constant", value=value)
    children = _children(value)
    if children is None:
        raise TreeError(where, f"a {type(value).__name__}", ALLOWED)
    kind, keys, items, name = children
    steps = _steps(kind, keys, len(items))
    built = tuple(_flatten(item, where + step, leaves) for step, item in zip(steps, items, strict=True))
    return Tree(kind, built, keys, name)


def _children(value: Any) -> tuple[Kind, tuple[Any, ...], list[Any], str] | None:
    """(kind, keys, items, class) of a container; None for anything else."""
    kind = type(value)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = tuple(field.name for field in dataclasses.fields(value) if field.init)
        return "dataclass", fields, [getattr(value, field) for field in fields], name
    if (names := _field_names(kind)) is not None:
        return "named_tuple", names, list(value), name
    if kind in (tuple, list):
        return ("tuple" if kind is tuple else "list"), (), list(value), ""
    if kind in (dict, collections.OrderedDict) and all(type(key) in (str, int) for key in value):
        return "dict", tuple(value), list(value.values()), "" if kind is dict else name
    return None


def _field_names(kind: type) -> tuple[str, ...] | None:
    """The names of a named tuple's items, or of a struct of C such as torch.return_types.topk; None for others."""
    if not issubclass(kind, tuple):
        return None
    if hasattr(kind, "_fields"):
        return tuple(kind._fields)
    names: tuple[str, ...] = getattr(kind, "__match_args__", ())
    # Others, such as os.stat_result, have fields that are not among the items.
    return names if len(names) == getattr(kind, "n_fields", None) else None


def _steps(kind: Kind, keys: Sequence[Any], count: int) -> list[str]:
    """The way to each of `count` items."""
    if kind in _RECORDS:
        return [f".{key}" for key in keys]
    return [f"[{key!r}]" for key in (keys if kind == "dict" else range(count))]


def match(tree: Tree, value: Any, where: str) -> Iterator[Any]:
    """The tensors of a value that must be built like `tree`; raises TreeError where it is not."""
    if tree.kind == "tensor":
        if not is_tensor(value):
            raise TreeError(where, describe(value), "a tensor")
        yield value
        return
    if tree.kind == "constant":
        is_nan = tree.value != tree.value  # NaN equals nothing, but is the same constant
        if type(value) is not type(tree.value) or not (value == tree.value or (is_nan and value != value)):
            raise TreeError(where, describe(value), f"{tree.value!r} (constants are compiled in)")
        return
    children = _children(value)
    found = None if children is None else (children[0], len(children[2]))
    if children is None or found != (tree.kind, len(tree.items)) or set(children[1]) != set(tree.keys):
        raise TreeError(where, describe(value), _expected(tree))
    items = children[2]
    if tree.kind in _KEYED:
        items = [value[key] if tree.kind == "dict" else getattr(value, key) for key in tree.keys]
    for step, item, child in zip(_steps(tree.kind, tree.keys, len(items)), items, tree.items, strict=True):
        yield from match(child, item, where + step)


def describe(value: Any) -> str:
    """A value in a few words, for errors."""
    if is_tensor(value):
        return "a tensor"
    if type(value) in CONSTANTS:
        return repr(value)
    if isinstance(value, dict):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _expected(tree: Tree) -> str:
    if tree.kind in ("tuple", "list"):
        return f"a {tree.kind} of {len(tree.items)}"
    if tree.kind == "dict":
        return f"a dict with keys {', '.join(map(str, tree.keys)) or '(none)'}"
    return f"a {tree.type.partition(':')[2]}"


def build(tree: Tree, tensors: Iterator[Any]) -> Any:
    """A value of this tree over the next tensors."""
    if tree.kind == "tensor":
        return next(tensors)
    if tree.kind == "constant":
        return tree.value
    items = [build(item, tensors) for item in tree.items]
    if tree.kind == "tuple":
        return tuple(items)
    if tree.kind == "list":
        return items
    if tree.kind == "dict":
        pairs = zip(tree.keys, items, strict=True)
        return collections.OrderedDict(pairs) if tree.type else dict(pairs)
    kind = _class(tree.type, tree.kind, tree.keys)
    fields = dict(zip(tree.keys, items, strict=True))
    if tree.kind == "named_tuple" and not hasattr(kind, "_fields"):  # a struct of C takes a sequence
        return kind([fields[name] for name in _field_names(kind) or ()])
    return kind(**fields)


def _class(name: str, kind: Kind, keys: tuple[str, ...]) -> Any:
    """The class itself where the caller has its module imported, else a class with the same name and fields."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for step in path.split("."):
        found = getattr(found, step, None)
    # A manifest may name anything to be called, so only classes of the kinds that trees are made of are.
    names: tuple[str, ...] | None = None
    if isinstance(found, type) and kind == "dataclass" and dataclasses.is_dataclass(found):
        names = tuple(field.name for field in dataclasses.fields(found) if field.init)
    elif isinstance(found, type):
        names = _field_names(found)
    return found if names is not None and set(names) == set(keys) else _stand_in(path, kind, keys)


@cache
def _stand_in(path: str, kind: Kind, keys: tuple[str, ...]) -> Any:
    name = path.rpartition(".")[2]
    if kind == "named_tuple":
        return collections.namedtuple(name, keys)
    return dataclasses.make_dataclass(name, keys)
