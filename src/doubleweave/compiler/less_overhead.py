"""Keeps Python out of the way while something is compiled. Knows nothing of models.

Compiling is Python for the most part: torch traces, and ExecuTorch runs some hundred passes over each segment. What is
kept away here takes half of the time that a small model needs, and does nothing for it.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

from doubleweave.compiler.code_when_called import code_made_when_called

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Objects that are made between two collections: Python's own 700 are made by one operator that is traced.
_COLLECT_AFTER = 50_000
# Slots of 8 bytes. Half a megabyte is some thousand frames, deeper than anything here goes.
_WIDE = 1 << 17
_MAKE_OPERATORS, _REGISTERED = "_materialize_cpp_cia_ops", "_dispatch_get_registrations_for_dispatch_key"
_AUTOGRAD_KEYS, _DEVICE_KEYS = "_AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE", "_BACKEND_KEYS_TO_OVERRIDE"
_NO_TRACES = "do_not_emit_stack_traces"
_SIZE_OPERATORS = ("_add", "_sub", "_mul", "_eq", "_ne", "_ge", "_gt", "_le", "_lt", "_sym_max", "_sym_min")

_is_frozen = False


def with_less_overhead(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that runs with a frozen heap, rare collections, room for its frames, operators listed once and for the
    CPU alone, sizes computed once, histories of nodes shared, no stack traces in them, and code of graphs made when it
    is called; nested ones change nothing."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        import executorch.exir  # noqa: F401  what is imported later is not frozen

        operators = (_operators_listed_once, _operators_of_the_cpu)
        nodes = (_sizes_computed_once, _nodes_without_copies_and_traces, code_made_when_called)
        with ExitStack() as stack:
            for kept_away in (_frozen_heap, *operators, *nodes):
                stack.enter_context(kept_away())
            return on_wide_frame(function)(*args, **kwargs)

    return run


def on_wide_frame(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function, above a frame so large that those of what it calls lie behind it.

    Python 3.11 keeps frames in chunks of 16 KiB, which it maps when a call crosses the end of one and unmaps when that
    call returns (pystate.c, push_chunk). A loop that happens to call across an end maps memory at every turn: half a
    million times for six small models, a fifth of the time. A chunk is as large as the frame that it is made for,
    rounded up to a power of two, and what is left of it is for the frames above.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        result: _R = _wide(function, args, kwargs)
        return result

    return run


def _wide(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


_wide.__code__ = _wide.__code__.replace(co_stacksize=_WIDE)


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """The garbage collector leaves alone what there is: torch, transformers and ExecuTorch are two million objects.

    What is made inside is collected as ever, but not as often. Where something is frozen already, nothing happens.
    """
    global _is_frozen
    if _is_frozen or gc.get_freeze_count():
        yield
        return
    before = gc.get_threshold()
    freeze_heap()
    try:
        yield
    finally:
        _is_frozen = False
        gc.set_threshold(*before)
        gc.unfreeze()


def freeze_heap() -> None:
    """Freeze what there is, for as long as the process lives where nothing else takes it back."""
    global _is_frozen
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
    _is_frozen = True  # what is frozen takes long to count


@contextmanager
def _operators_listed_once() -> Iterator[None]:
    """torch makes Python objects of the dispatcher's composite operators once for each namespace of each decomposition,
    which is a tenth of the time. They stay, so it does that again only when more operators were registered."""
    import torch
    from torch._export import utils

    make: Callable[[], None] | None = getattr(utils, _MAKE_OPERATORS, None)
    registered: Callable[[str], Any] | None = getattr(torch._C, _REGISTERED, None)
    if make is None or registered is None:  # another torch
        yield
        return
    known = -1

    def make_new() -> None:
        nonlocal known
        if (number := len(registered("CompositeImplicitAutograd"))) != known:
            make()
            known = number

    setattr(utils, _MAKE_OPERATORS, make_new)
    try:
        yield
    finally:
        setattr(utils, _MAKE_OPERATORS, make)


@contextmanager
def _operators_of_the_cpu() -> Iterator[None]:
    """Each export overrides torch's composite operators for every device that torch knows: a tenth of the time. What is
    compiled here is on the CPU."""
    from torch import _C
    from torch.export import exported_program

    keys = _C.DispatchKey
    with ExitStack() as patches:
        for name, wanted in ((_AUTOGRAD_KEYS, [keys.AutogradCPU]), (_DEVICE_KEYS, [keys.CPU, keys.Meta])):
            if hasattr(exported_program, name):
                _replace(patches, exported_program, name, wanted)
        yield


@contextmanager
def _nodes_without_copies_and_traces() -> Iterator[None]:
    """torch copies a node's whole history (`NodeSource`) for each node that comes of it, and writes down where in the
    model's Python each was made: a tenth of the time. A history never changes, so all nodes may have the same; nothing
    here reads where a node was made."""
    from torch import fx
    from torch.fx.traceback import NodeSource

    with ExitStack() as patches:
        _replace(patches, NodeSource, "__deepcopy__", lambda self, memo: self)
        if hasattr(fx.config, _NO_TRACES):
            _replace(patches, fx.config, _NO_TRACES, True)
        yield


@contextmanager
def _sizes_computed_once() -> Iterator[None]:
    """torch works out the sizes, strides and contiguity of each fake tensor anew, half a million sums and comparisons
    of sizes for a small model, of which one in seventy is new: a tenth of the time. Expressions never change, so a
    result serves every time that the same operator meets the same two while the same replacements are known. Each time
    it is a node of its own: by which node a size is, torch knows the tensor that it comes from.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.fx.experimental.sym_node import SymNode

    known: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def remembering(name: str, operator: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(a: Any, b: Any) -> Any:
            # While a graph is traced, operators on sizes become its nodes.
            if a.shape_env is None or a.fx_node or b.fx_node or get_proxy_mode():
                return operator(a, b)
            results = known.setdefault(a.shape_env, {})
            key = (name, a.shape_env._replacements_version_counter, *_content(a), *_content(b))
            if (found := results.get(key)) is None:
                found = results[key] = operator(a, b)
            again = object.__new__(SymNode)
            vars(again).update(vars(found))
            return again

        return run

    with ExitStack() as patches:
        # Private as they are, a torch without one of them computes as it does.
        for name in _SIZE_OPERATORS if hasattr(SymNode, "_optimized_summation") else ():
            if operator := getattr(SymNode, name, None):
                _replace(patches, SymNode, name, remembering(name, operator))
        yield


def _content(size: Any) -> tuple[Any, ...]:
    """What a result depends on, of one of the two that an operator meets."""
    return size._expr, size._hint, size.pytype, size._optimized_summation


def _replace(patches: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, until `patches` ends."""
    if name in vars(owner):
        patches.callback(setattr, owner, name, getattr(owner, name))
    else:
        patches.callback(delattr, owner, name)
    setattr(owner, name, value)
