"""The interface of a callable piece: its parameters and the tree of its result, as plain data.

It binds a call's arguments as Python does, and checks them against the arguments that the piece was compiled with. It
knows nothing of shapes or of memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from doubleweave.errors import InputError
from doubleweave.ir.trees import Tree, TreeError, build, flatten, match

_KINDS = {kind.name: kind for kind in inspect._ParameterKind}


# Stands for an argument that the call leaves out and that has no constant default; a signature shows it as "...".
class _NotGiven:
    def __repr__(self) -> str:
        return "..."


_NOT_GIVEN = _NotGiven()


@dataclass(frozen=True)
class Parameter:
    """One parameter of `forward`. `tree` is None where nothing was given when it was compiled and the default is
    no constant; `default` is the default where it is a constant."""

    name: str
    kind: str
    tree: Tree | None
    default: Tree | None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"parameter kind {self.kind!r}")

    @property
    def has_default(self) -> bool:
        return self.default is not None or self.tree is None


@dataclass(frozen=True)
class Interface:
    """Parameters and the tree of the result; input tensors are numbered in the order of the parameters, results in that
    of the tree."""

    parameters: tuple[Parameter, ...]
    returns: Tree

    @property
    def input_names(self) -> tuple[str, ...]:
        """The path of each input tensor: "x", "mask", "cfg.scale", "xs[1]"."""
        return tuple(path for p in self.parameters if p.tree is not None for path in p.tree.paths(p.name))

    def signature(self) -> inspect.Signature:
        """A Python signature, with the module's own defaults where they are constants."""
        parameters = []
        seen_default = False
        for p in self.parameters:
            default: Any = inspect.Parameter.empty
            if p.has_default:
                default = _NOT_GIVEN if p.default is None else p.default.value
            elif seen_default and p.kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD"):
                default = _NOT_GIVEN  # required all the same: Python wants a default behind one
            seen_default = seen_default or default is not inspect.Parameter.empty
            parameters.append(inspect.Parameter(p.name, _KINDS[p.kind], default=default))
        return inspect.Signature(parameters)

    def bind(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The input tensors of a call. Raises InputError naming the argument that does not fit."""
        signature = self.signature()
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(f"{name}: {error}; expected {name}{signature}") from None
        bound.apply_defaults()
        tensors: list[Any] = []
        for p in self.parameters:
            value = bound.arguments[p.name]
            if p.tree is None and value is _NOT_GIVEN:
                continue
            if p.tree is None:
                raise InputError(
                    f"{name}: {p.name} was given, but not when the module was compiled: leave it out, or "
                    "compile with it"
                )
            if value is _NOT_GIVEN:
                raise InputError(
                    f"{name}: missing a required argument: {p.name!r}; expected {name}{signature}"
                )
            try:
                tensors += match(p.tree, value, p.name)
            except TreeError as error:
                raise InputError(f"{name}, {error}") from None
        return tensors

    def result(self, tensors: Iterator[Any]) -> Any:
        return build(self.returns, tensors)


def parameters_of(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Parameter, ...], list[Any]]:
    """The parameters of a function as called, and the tensors given.

    Raises TypeError when the arguments do not fit the function, TreeError for one that no tree holds.
    """
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs)
    parameters, tensors = [], []
    for name, parameter in signature.parameters.items():
        is_required = parameter.default is inspect.Parameter.empty
        default = None if is_required else _constant(parameter.default)
        tree = default
        if name in bound.arguments or is_required:
            # *args and **kwargs that got nothing are absent from `bound`.
            empty: Any = () if parameter.kind is inspect.Parameter.VAR_POSITIONAL else {}
            tree, leaves = flatten(bound.arguments.get(name, empty), name)
            tensors += leaves
        parameters.append(Parameter(name, parameter.kind.name, tree, default))
    return tuple(parameters), tensors


def _constant(value: Any) -> Tree | None:
    try:
        tree, leaves = flatten(value, "")
    except TreeError:
        return None
    return tree if not leaves and tree.kind == "constant" else None
