"""Find the channels of a language model's split that can be scaled: computed in one place, read by linears alone.

Divided by a factor a channel where they are made and multiplied by it in the columns of who reads them, the numbers
stay what they were. Three places have that: a norm's own weights, what a gate is multiplied with before the
down-projection, and values, which attention adds up and the output projection reads. Knows nothing of recipes or
backends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.nodes import RESHAPES, is_call, nodes_of, output_node
from doubleweave.compiler.graph.ops import ATTENTIONS, CROSS
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.tied import identity, is_table
from doubleweave.compiler.split.weights import Weights
from doubleweave.ir.split import Call

aten = torch.ops.aten


class Place(NamedTuple):
    """A weight of a segment, by its number."""

    segment: str
    weight: int


@dataclass(frozen=True)
class Channels:
    """`makers` are the weights whose rows are divided by a factor of each channel (a norm's; a linear's, and its bias),
    `readers` those whose column j is multiplied by the factor of channel `of_column[j]`, [K].

    The activation that the readers share is the input `port` of their segment, or the node called `node` in it.
    `tables` are the same tensors as readers, which others look rows up in.
    """

    makers: tuple[Place, ...]
    readers: tuple[Place, ...]
    of_column: Tensor
    port: int | None = None
    node: str = ""
    tables: tuple[Place, ...] = ()


def find_channels(torch_split: TorchSplit) -> list[Channels]:
    """All that a split has. A segment that runs twice is left alone, and so are weights that something else reads."""
    graphs = {segment.name: _graph(torch_split, segment.name) for segment in torch_split.split.segments}
    edges = _Edges(torch_split)
    found = [channels for name in edges.once for channels in _inside(name, graphs[name])]
    for call in torch_split.split.calls:
        attention = attention_of(graphs[call.segment])
        if attention is not None:
            value, result, groups = call.reads[2], call.writes[0], _groups(attention)
            if value not in call.reads[:2]:
                found += _across(graphs, edges, value, result, groups)
    found += [each for value in edges.makers for each in _across(graphs, edges, value, value, (1, 1))]
    # Held as long as they are told apart: what is made when it is asked for would lie where another was.
    weights = dict(torch_split.weights)
    holders: defaultdict[Any, list[Place]] = defaultdict(list)
    for segment, own in weights.items():
        for number, weight in enumerate(own):
            holders[identity(weight)].append(Place(segment, number))
    with_tables = (_with_tables(weights, graphs, holders, each) for each in found)
    return [each for each in with_tables if each is not None and _are_whole(weights, each)]


def _graph(torch_split: TorchSplit, segment: str) -> fx.Graph:
    return torch_split.graphs[torch_split.split.segment(segment).structure].graph


class _Edges:
    """Who makes and who reads each value, of the calls whose segments run once."""

    def __init__(self, torch_split: TorchSplit) -> None:
        calls = torch_split.split.calls
        runs = Counter(call.segment for call in calls)
        alone: list[Call] = [call for call in calls if runs[call.segment] == 1]
        self.once = [call.segment for call in alone]
        self.num_readers = Counter(name for call in calls for name in set(call.reads))
        self.makers = {name: (call.segment, at) for call in alone for at, name in enumerate(call.writes)}
        self.readers = {name: (call.segment, at) for call in alone for at, name in enumerate(call.reads)}


def attention_of(graph: fx.Graph) -> Any:
    """The operator of a graph that is attention and nothing else."""
    found = [node for node in nodes_of(graph) if is_call(node, *ATTENTIONS) and node.target is not CROSS]
    return found[0] if len(found) == 1 and output_node(graph).all_input_nodes == found else None


def _groups(attention: Any) -> tuple[int, int]:
    """The number of heads that read the same values, and of values' heads."""
    num_heads, num_kv_heads = attention.args[3:5]
    return num_heads // num_kv_heads, num_kv_heads


def _inside(segment: str, graph: fx.Graph) -> Iterator[Channels]:
    for node in nodes_of(graph):
        makers, readers = _makers(segment, node), _readers(segment, node)
        if makers and readers:
            width = int(node.meta["val"].shape[-1])
            yield Channels(makers, readers, torch.arange(width), node=node.name)


def _across(
    graphs: Mapping[str, fx.Graph], edges: _Edges, made: str, read: str, groups: tuple[int, int]
) -> Iterator[Channels]:
    """Channels of the value `made`, which become those of the value `read`, each head's in a group of them."""
    if made not in edges.makers or read not in edges.readers:
        return
    if edges.num_readers[made] != 1 or edges.num_readers[read] != 1:
        return
    (maker, output), (reader, port) = edges.makers[made], edges.readers[read]
    placeholder = graphs[reader].find_nodes(op="placeholder")[port]
    makers = _makers(maker, output_node(graphs[maker]).args[0][output])
    readers = _readers(reader, placeholder)
    if makers and readers:
        size, count = groups
        width = int(placeholder.meta["val"].shape[-1])
        channels = torch.arange(width // size).view(count, 1, -1)
        of_column = channels.expand(count, size, channels.shape[-1]).reshape(-1)
        yield Channels(makers, readers, of_column, port=port)


def _makers(segment: str, node: Any) -> tuple[Place, ...]:
    """The weights whose rows are the channels of a node's last dim, or a factor of each; none where there are none."""
    while is_call(node, *RESHAPES) and len(node.users) == 1:
        node = node.args[0]
    if is_call(node, aten.linear.default):
        own = [each for each in node.args[1:] if each is not None]
        return tuple(map(_place(segment), own)) if _are_own(own, node) else ()
    if not is_call(node, aten.mul.Tensor):
        return ()
    sources = [source for source in node.args[:2] if isinstance(source, fx.Node)]
    if weight := next((each for each in sources if each.op == "get_attr" and _is_vector(each, node)), None):
        return (_place(segment)(weight),) if _are_own([weight], node) else ()
    # Of two factors, one linear's.
    linears = [each for each in sources if is_call(each, aten.linear.default) and len(each.users) == 1]
    return next(filter(None, (_makers(segment, each) for each in reversed(linears))), ())


def _readers(segment: str, node: Any) -> tuple[Place, ...]:
    """The weights of the linears that read a node; none where something else reads it too."""
    users = list(node.users)
    if not all(is_call(user, aten.linear.default) and user.args[0] is node for user in users):
        return ()
    if not all(_are_own([user.args[1]], user) for user in users):
        return ()
    return tuple(_place(segment)(user.args[1]) for user in users)


def _place(segment: str) -> Any:
    return lambda node: Place(segment, int(node.target[1:]))


def _are_own(weights: Sequence[Any], node: Any) -> bool:
    """Whether weights are read by this node alone."""
    return all(each.op == "get_attr" and list(each.users) == [node] for each in weights)


def _is_vector(weight: Any, node: Any) -> bool:
    return tuple(weight.meta["val"].shape) == (node.meta["val"].shape[-1],)


def _are_whole(weights: Mapping[str, Weights], channels: Channels) -> bool:
    """Whether makers have a row for each channel: not of a slice of what a linear computes, or of each head of it."""
    count = int(channels.of_column.max()) + 1
    return all(len(weights[place.segment][place.weight]) == count for place in channels.makers)


def _with_tables(
    weights: Mapping[str, Weights],
    graphs: Mapping[str, fx.Graph],
    holders: Mapping[Any, list[Place]],
    channels: Channels,
) -> Channels | None:
    """The channels with the tables that are tied to readers; None where a weight is used in any other way too."""
    tables = []
    for place in (*channels.makers, *channels.readers):
        weight = weights[place.segment][place.weight]
        others = [each for each in holders[identity(weight)] if each != place]
        if others and (
            place in channels.makers or not all(is_table(graphs[p.segment], p.weight) for p in others)
        ):
            return None
        tables += others
    return replace(channels, tables=tuple(tables))
