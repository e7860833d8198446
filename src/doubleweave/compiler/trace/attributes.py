"""A module's plain attributes: `forward` must not rely on them from call to call, a program remembers buffers alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from doubleweave.errors import SplitError

# Where nn.Module keeps parameters, buffers, modules, hooks and its mode; and what a trace sets itself.
_NOT_STATE = frozenset([*vars(nn.Module()), "forward"])
_HOOKS = [name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)]
_KEPT = (bool, int, float, str, tuple, list, dict, set)
Kept = dict[tuple[int, str], tuple[nn.Module, Any, Any]]  # by module and name: (module, value, its contents)


def kept(module: nn.Module) -> Kept:
    """The plain attributes of all modules: torch.export freezes their values even where `forward` changes them."""
    return {
        # Not the module: torch.export wraps modules anew each time, around the same attributes.
        (id(vars(owner)), name): (owner, value, _contents(value))
        for owner in module.modules()
        if not isinstance(owner, nn.RNNBase)  # it keeps its weights in a list besides
        for name, value in vars(owner).items()
        if name not in _NOT_STATE and isinstance(value, _KEPT)
    }


def _contents(value: Any) -> Any:
    """A value to compare later: containers by items, tensors by identity and version, objects by type alone."""
    if isinstance(value, (tuple, list)):
        return [_contents(item) for item in value]
    if isinstance(value, dict):
        return {key: _contents(item) for key, item in value.items()}
    if isinstance(value, set):
        return set(value)
    if isinstance(value, Tensor):
        return (id(value), value._version)
    # Lists compare items by identity first: NaN is NaN.
    return [value if isinstance(value, _KEPT) else type(value)]


def _containers(value: Any, found: dict[int, Any]) -> None:
    """Add each list, dict and set in this value, itself included, by identity."""
    if type(value) not in (list, dict, set, tuple) or id(value) in found:
        return
    found[id(value)] = value
    for item in value.values() if isinstance(value, dict) else value:
        _containers(item, found)


def check_kept(module: nn.Module, before: Kept) -> None:
    """Raise SplitError where an attribute has another value than `before`."""
    after = kept(module)
    for key, (owner, value, contents) in before.items():
        _, now, found = after.get(key, (owner, None, contents))
        if found == contents:
            continue
        what = (
            f"sets {key[1]!r} to {now!r}"
            if isinstance(value, (bool, int, float, str))
            else f"changes the {type(value).__name__} {key[1]!r}"
        )
        raise SplitError(
            f"{type(owner).__name__}: forward {what}, which a program does not remember; make it a buffer with "
            "register_buffer"
        )


Snapshot = list[tuple[nn.Module, dict[str, Any]]]


def snapshot(module: nn.Module) -> Snapshot:
    """Every attribute of every module."""
    return [(owner, dict(vars(owner))) for owner in module.modules()]


def changed(before: Snapshot) -> list[tuple[nn.Module, str, dict[str, Any]]]:
    """The attributes that were set since the snapshot, with all that their module had then."""
    return [
        (owner, name, had)
        for owner, had in before
        for name, value in vars(owner).items()
        if name not in _NOT_STATE and (name not in had or had[name] is not value)
    ]


@contextlib.contextmanager
def attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore on exit every attribute that was set within the context, the items of containers, and hooks."""
    before = snapshot(module)
    found: dict[int, Any] = {}
    for _, attributes in before:
        for name, value in attributes.items():
            if name not in _NOT_STATE:
                _containers(value, found)
    # A module that adds hooks when it is first called notes in an attribute that they are there: both go, or neither.
    found |= {
        id(attributes[name]): attributes[name]
        for _, attributes in before
        for name in _HOOKS
        if name in attributes
    }
    containers = [(value, value.copy()) for value in found.values() if not isinstance(value, tuple)]
    try:
        yield
    finally:
        for container, contents in containers:
            if isinstance(container, list):
                container[:] = contents
            else:
                container.clear()
                container.update(contents)
        for owner, name, had in changed(before):
            if name in had:
                owner.__dict__[name] = had[name]
            else:
                del owner.__dict__[name]
