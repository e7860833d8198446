"""What each linear of a language model is for: found in how its result is used, not in its module's name.

| role | the linear |
|---|---|
| q, k, v | what attention takes is computed from it, no linear between; "kv" and the like where it is several |
| o | reads what attention gives, and no linear lies between |
| down | reads nothing but what other linears of the segment give |
| up, gate | what a down reads: gate through an activation, up straight into the product; up where there is one alone |
| head | logits are computed from it |
| router | experts are chosen by it |
| other | none of these |

Experts have the roles of the linears that they stand for. Where attention is written out in the graph (static
attention, a model's own operators) its linears are "other". Knows nothing of recipes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from doubleweave.compiler.graph import expert_ops as _ops  # noqa: F401  registers doubleweave::expert_linear
from doubleweave.compiler.graph.linear_ops import LINEAR_QUANTIZED
from doubleweave.compiler.graph.nodes import LAYOUT, is_call, nodes_of, output_node
from doubleweave.compiler.quantize.channels import attention_of
from doubleweave.compiler.split.pieces import TorchSplit

aten = torch.ops.aten
ours = torch.ops.doubleweave

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "head", "router", "other")
_EXPERTS = (ours.expert_linear.default, ours.expert_linear_quantized.default)
# Linears, and which of their arguments is the weight. The rows that they multiply are the first.
WEIGHT_OF = {
    aten.linear.default: 1,
    LINEAR_QUANTIZED: 1,
    **dict.fromkeys(_EXPERTS, 2),
}
# What lies between a linear and the product that the next one reads, where it is no gate.
_PRODUCTS = LAYOUT | {
    *(
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.clamp.default,
        aten.cat.default,
        operator.getitem,
    )
}


def roles_of(torch_split: TorchSplit) -> dict[str, dict[str, str]]:
    """By segment, the role of each linear by its node's name."""
    graphs = {s.name: torch_split.graphs[s.structure].graph for s in torch_split.split.segments}
    uses: dict[str, str] = {}  # of values: what reads or writes them
    for value in torch_split.split.values:
        if value.kind == "output":
            uses[value.name] = "head"
    for call in torch_split.split.calls:
        if attention_of(graphs[call.segment]) is not None:
            uses.update(zip(call.reads[:3], ("q", "k", "v"), strict=True))
            uses[call.writes[0]] = "o"
    found: dict[str, dict[str, str]] = {}
    for call in torch_split.split.calls:
        if call.segment not in found:
            read, written = ([uses.get(name, "") for name in names] for names in (call.reads, call.writes))
            found[call.segment] = _of_graph(graphs[call.segment], read, written)
    return {name: found.get(name, {}) for name in graphs}


def _of_graph(graph: fx.Graph, read: Sequence[str], written: Sequence[str]) -> dict[str, str]:
    """`read` and `written` are what the graph's inputs and outputs are used as."""
    linears = [node for node in nodes_of(graph) if is_call(node, *WEIGHT_OF)]
    if not linears:
        return {}
    placeholders = dict(zip(graph.find_nodes(op="placeholder"), read, strict=True))
    wanted: dict[Any, list[str]] = {node: [] for node in linears}
    for result, use in zip(output_node(graph).args[0], written, strict=True):
        if use and use != "o":
            for node in _sources(result):
                if node in wanted and use not in wanted[node]:
                    wanted[node].append(use)
    found = {node: "".join(uses) for node, uses in wanted.items() if uses}
    found |= dict.fromkeys(routers_of(graph), "router")
    sources = {node: list(_sources(node.args[0])) for node in linears}
    for node in linears:
        if node in found:
            continue
        if any(placeholders.get(source) == "o" for source in sources[node]) and wanted.keys().isdisjoint(
            sources[node]
        ):
            found[node] = "o"
        elif sources[node] and wanted.keys() >= set(sources[node]):
            found[node] = "down"
    for node in linears:
        if found.get(node) == "down":
            for source in sources[node]:
                found.setdefault(source, "gate" if _is_gate(source) else "up")
    # Of a down that reads one linear through an activation, that one is no gate: nothing is multiplied by it.
    for node in linears:
        if found.get(node) == "down" and len(sources[node]) == 1 and found[sources[node][0]] == "gate":
            found[sources[node][0]] = "up"
    return {node.name: found.get(node, "other") for node in linears}


def routers_of(graph: fx.Graph) -> set[Any]:
    """The linears that experts are chosen by."""
    chosen = [node.args[1] for node in nodes_of(graph) if is_call(node, *_EXPERTS)]
    return {source for index in chosen for source in _sources(index) if is_call(source, *WEIGHT_OF)}


def _sources(node: Any) -> Iterator[Any]:
    """The linears and placeholders that a node is computed from, with no linear between."""
    todo, seen = [node], {node}
    for each in todo:
        if each.op == "placeholder" or is_call(each, *WEIGHT_OF):
            yield each
            continue
        more = [source for source in each.all_input_nodes if source not in seen]
        seen.update(more)
        todo += more


def _is_gate(linear: Any) -> bool:
    """Whether a linear's result goes through an activation on its way to the next linear."""
    todo, seen = list(linear.users), set(linear.users)
    for node in todo:
        if node.op == "output" or is_call(node, *WEIGHT_OF):
            continue
        if node.target not in _PRODUCTS and getattr(node.target, "namespace", "") != "quantized_decomposed":
            return True
        more = [user for user in node.users if user not in seen]
        seen.update(more)
        todo += more
    return False


def role_of_weights(roles: Mapping[str, str], graph: fx.Graph) -> dict[int, str]:
    """By index, the role of each weight of a graph that a linear reads."""
    found: dict[int, str] = {}
    for node in nodes_of(graph):
        if is_call(node, *WEIGHT_OF):
            weight = node.args[WEIGHT_OF[node.target]]
            if weight.op == "get_attr":
                found.setdefault(int(weight.target[1:]), roles[node.name])
    return found
