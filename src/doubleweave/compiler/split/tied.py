"""Find the tables of a split that are linears' weights too, while both are still the same tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import is_call
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.sources.file_weights import FileWeight

aten = torch.ops.aten


def tied_tables(torch_split: TorchSplit) -> dict[tuple[str, int], tuple[str, int]]:
    """By (segment, number) of a weight that nothing but lookups read, those of a linear that has the same tensor."""
    linears: dict[Any, tuple[str, int]] = {}
    tables: list[tuple[Any, tuple[str, int]]] = []
    # Held as long as they are told apart: what is made when it is asked for would lie where another was.
    weights = dict(torch_split.weights)
    for segment in torch_split.split.segments:
        graph = torch_split.graphs[segment.structure].graph
        for number, weight in enumerate(weights[segment.name]):
            if is_table(graph, number):
                tables.append((identity(weight), (segment.name, number)))
            elif any(
                is_call(user, aten.linear.default) and user.args[1] is node
                for node, user in _uses(graph, number)
            ):
                linears[identity(weight)] = (segment.name, number)
    return {place: linears[tensor] for tensor, place in tables if tensor in linears}


def is_table(graph: fx.Graph, number: int) -> bool:
    """Whether rows of a weight are looked up, and nothing else is done with it."""
    uses = list(_uses(graph, number))
    return bool(uses) and all(
        is_call(user, aten.embedding.default) and user.args[0] is node for node, user in uses
    )


def _uses(graph: fx.Graph, number: int) -> Iterator[tuple[Any, Any]]:
    """The nodes that are a weight, each with each that reads it."""
    for node in graph.find_nodes(op="get_attr"):
        if node.target == f"w{number}":
            yield from ((node, user) for user in node.users)


def identity(weight: Tensor) -> Any:
    """The same for tensors that are one: by their memory, where they have any."""
    return id(weight) if isinstance(weight, FileWeight) else (weight.data_ptr(), weight.numel())
