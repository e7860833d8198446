"""Show from the graph that a language model's rows meet in attention alone, so that a prompt may be cut into chunks.

Each row is a token. What mixes rows elsewhere (a convolution, a recurrence), or is made from how many there are
(positions that the model counts by itself), would give other numbers in the next chunk.
"""

from __future__ import annotations

import torch
from torch import fx

from doubleweave.compiler.graph.nodes import ENCODED, STATE, TOGETHER
from doubleweave.compiler.graph.ops import ATTENTIONS, CROSS, GENERAL
from doubleweave.compiler.graph.positions import num_rows
from doubleweave.compiler.graph.refusal_causes import place_of_node
from doubleweave.compiler.split.row_rules import Axis, Follower, MixesRows, UnknownOperator
from doubleweave.errors import SplitError

# Operators of ours, with how many of their arguments have rows: attention is where rows may meet, and rotary embedding
# turns each row by its own angles. An encoder's rows are the same for every chunk.
_OURS = dict.fromkeys(ATTENTIONS, 3) | {torch.ops.doubleweave.rotary.default: 3, CROSS: 1}
_ROWS_AXIS = 1  # of token ids, positions and all that attention takes and gives: [1, T, …]


def check_rows(graph_module: fx.GraphModule, model: str) -> None:
    """Raises SplitError that names the module and the operator in which rows meet, or are not followed."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    # A state is there once for each row.
    rows: dict[fx.Node, Axis] = {node: 0 if STATE in node.meta else _ROWS_AXIS for node in placeholders}
    rows.update(dict.fromkeys((node for node in placeholders if ENCODED in node.meta), None))
    follow = Follower(rows, num_rows(graph_module.graph))
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            rows[node] = None
        elif TOGETHER in node.meta:
            # A recurrence runs row behind row, over a batch of one; its results have the rows that it was given.
            rows[node] = _axis_of_rows(node, follow)
        elif node.target is GENERAL or (
            node.target in _OURS and None not in map(follow.axis, node.args[: _OURS[node.target]])
        ):
            rows[node] = _ROWS_AXIS
        elif node.op == "call_function":
            try:
                follow.node(node)
            except MixesRows as error:
                raise SplitError(
                    f"{model}: in {place_of_node(node)} {error}: expected a decoder whose tokens meet in attention "
                    "alone, because a prompt runs chunk by chunk; this architecture is not supported"
                ) from None
            except UnknownOperator as error:
                raise SplitError(
                    f"{model}: in {place_of_node(node)} tokens are not followed through {error}, so they may meet "
                    "there: expected a decoder whose tokens meet in attention alone; this architecture is not supported"
                ) from None


def _axis_of_rows(node: fx.Node, follow: Follower) -> Axis:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    if not isinstance(first, torch.Tensor):
        return None
    return next((axis for axis, size in enumerate(first.shape) if follow.has_rows(size)), None)
