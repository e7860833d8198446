"""Keeps ExecuTorch from tracing a graph again that nothing has changed since it was traced last, and, where it traces
one, from computing again what an operator gives for the same tensors.

Each of XNNPACK's seventeen passes ends by running the graph through an interpreter, so that what it put in gets its
shapes. Most find nothing to do, and for each piece that is delegated they do so seventeen times: a quarter of the time
that a small model takes. Knows nothing of backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

_PLAIN = frozenset({int, bool, float, str, type(None)})
_TRACED = "doubleweave_traced"  # in a graph module's meta: what the graph was when it was traced


@contextmanager
def unchanged_graphs_kept() -> Iterator[None]:
    """Meanwhile a pass that changes no operator on the way returns a graph as it is that such a pass has traced."""
    from executorch.exir.pass_base import ExportPass
    from torch.fx.passes.infra.pass_base import PassResult

    trace: Callable[..., PassResult] = ExportPass.call
    methods = {name for name in dir(ExportPass) if callable(getattr(ExportPass, name)) and name[:2] != "__"}
    hooks = methods - {"call", "requires", "ensures"}

    def changes_on_the_way(kind: type) -> bool:
        """What a subclass does on the way, such as for each operator, may be another thing each time."""
        own = takewhile(lambda parent: parent is not ExportPass, kind.__mro__)
        return any(hooks.intersection(vars(parent)) for parent in own)

    def call(self: Any, graph_module: fx.GraphModule) -> PassResult:
        if changes_on_the_way(type(self)) or _has_parts(graph_module):
            return trace(self, graph_module)
        if graph_module.meta.get(_TRACED) == _text(graph_module.graph):
            return PassResult(graph_module, True)
        result = trace(self, graph_module)
        result.graph_module.meta[_TRACED] = _text(result.graph_module.graph)
        return result

    ExportPass.call = call
    try:
        with _results_known():
            yield
    finally:
        ExportPass.call = trace


@contextmanager
def _results_known() -> Iterator[None]:
    """Meanwhile a pass that does trace a graph computes what an operator gives for the same tensors only once.

    Tensors are fake and nothing changes them: an operator that no pass has replaced has the result that it had.
    """
    from executorch.exir.pass_base import ExportPass

    trace: Callable[..., Any] = ExportPass._fx
    known: dict[Any, tuple[Any, Any]] = {}  # with what was given, so that ids stay theirs

    def run(compute: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if any(isinstance(leaf, fx.GraphModule) for leaf in leaves):
            return compute(target, args, kwargs)
        key = (target, spec, *((type(leaf), leaf if type(leaf) in _PLAIN else id(leaf)) for leaf in leaves))
        if key not in known:
            known[key] = compute(target, args, kwargs), leaves
        return known[key][0]

    def trace_known(self: Any, *given: Any) -> Any:
        own = self.interpreter
        if "call_function" not in vars(own):
            own.call_function = partial(run, own.call_function)
        return trace(self, *given)

    ExportPass._fx = trace_known
    try:
        yield
    finally:
        ExportPass._fx = trace


def _has_parts(graph_module: fx.GraphModule) -> bool:
    return any(isinstance(child, fx.GraphModule) for child in graph_module.children())


def _text(graph: fx.Graph) -> list[object]:
    """All that shapes follow from: the operators with their arguments, and the inputs' shapes, dtypes and strides."""
    found: list[object] = []
    for node in graph.nodes:
        found.append(node.format_node())
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            found.append((str(value.shape), str(value.stride()), value.dtype))
    return found
