"""Put a plain function's operators into a graph, as tracing it over the fake values of nodes gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx


def inline(
    graph: fx.Graph,
    function: Callable[..., Tensor],
    inputs: list[fx.Node],
    parameters: tuple[Any, ...],
    stack: dict[str, Any],
) -> fx.Node:
    """Insert `function(*inputs, *parameters)` at the graph's insertion point; `stack` is its place in the module.

    Returns the node of the result.
    """
    trace = make_fx(lambda *tensors: function(*tensors, *parameters), tracing_mode="real", pre_dispatch=True)
    traced = trace(*(node.meta["val"] for node in inputs))
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    copied: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    *operators, output = (node for node in traced.graph.nodes if node not in copied)
    for node in operators:
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        copied[node].meta = {"val": node.meta["val"], "nn_module_stack": stack}
    found: fx.Node = copied[output.args[0]]
    return found
