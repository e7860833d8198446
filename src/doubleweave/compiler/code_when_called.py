"""Python code of graphs is made when somebody asks for it, not whenever a graph has changed. Knows nothing of models.

Each of ExecuTorch's hundred passes ends by recompiling its graph: torch.fx writes the graph down as Python and compiles
that. For a small model that is twenty thousand times, a seventh of the time, and one in twenty is ever called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What recompiling gives a graph module, or the class that is its alone.
_MADE = ("forward", "_code", "_lineno_map", "_prologue_start")


@contextmanager
def code_made_when_called() -> Iterator[None]:
    """Inside, `recompile` only notes that code is to be made, from the graph as it is when somebody asks for it.

    Calls ask, and who looks at `forward`, `code` or what `recompile` returns, inside and later.
    """
    from torch.fx import GraphModule

    made_at_once: Any = GraphModule.recompile
    reduced: Any = GraphModule.__reduce__

    def recompile(self: Any) -> Any:
        owner = type(self)
        if owner.__mro__[1] is not GraphModule:  # a subclass does it in a way of its own
            return made_at_once(self)
        if (info := getattr(self._graph._codegen, "pytree_info", None)) is not None:
            self._in_spec, self._out_spec = info.in_spec, info.out_spec
        for name in _MADE:
            vars(self).pop(name, None)
            setattr(owner, name, _Later(name, self, made_at_once))
        self._recompile_submodules()
        return _LaterCode(self, made_at_once)

    def reduce(self: Any) -> Any:  # it copies what a module has before it looks at the code
        GraphModule.recompile = made_at_once  # type: ignore[method-assign]
        try:
            self.recompile()
            return reduced(self)
        finally:
            GraphModule.recompile = recompile  # type: ignore[method-assign]

    GraphModule.recompile, GraphModule.__reduce__ = recompile, reduce  # type: ignore[method-assign]
    try:
        yield
    finally:
        GraphModule.recompile, GraphModule.__reduce__ = made_at_once, reduced  # type: ignore[method-assign]


class _Later:
    """Stands in a graph module's own class for what recompiling makes, until somebody asks for it."""

    def __init__(self, name: str, graph_module: Any, recompile: Callable[[Any], Any]) -> None:
        self.name, self.graph_module, self.recompile = name, weakref.ref(graph_module), recompile

    def __get__(self, instance: Any, owner: Any) -> Any:
        self.recompile(self.graph_module() if instance is None else instance)
        return getattr(owner if instance is None else instance, self.name)


class _LaterCode:
    """What `recompile` returns: made anew for the few who read it."""

    def __init__(self, graph_module: Any, recompile: Callable[[Any], Any]) -> None:
        self._graph_module, self._recompile = graph_module, recompile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recompile(self._graph_module), name)
