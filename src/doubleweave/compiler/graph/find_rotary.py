"""Find rotary embedding by what it does, however a model writes it, and make it our operator.

A model may turn halves or neighbours, repeat its tables, slice, stack, interleave and scale on the way. What lies
between a tensor of features, tables that follow from the positions, and a tensor of the same size is evaluated. Where
its matrix is a turn of pairs (rotary_matrix.py), the operator takes its place, after it gave the same numbers for
random features and tables. The order of the features is put into the rows of the projection where x is one, and stays
changed in the result where it is a query or a key: scores do not change where both have the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from doubleweave.compiler.graph.evaluate import Evaluator
from doubleweave.compiler.graph.nodes import constant, expression, insert, is_call, is_tensor, nodes_of
from doubleweave.compiler.graph.ops import ATTENTIONS
from doubleweave.compiler.graph.positions import MOVES, from_positions
from doubleweave.compiler.graph.rotary_matrix import Column, Turn, inverse, natural, turn_of

aten = torch.ops.aten

_KEEPS_FEATURES = (aten.view.default, aten.reshape.default, aten.transpose.int, aten.clone.default)
_MOST_NODES = 48  # of a piece that is tried
_MOST_SLICES = 8  # of an order of features


@dataclass(frozen=True)
class _Found:
    x: Any
    y: Any
    inside: frozenset[Any]
    tables: tuple[Any, ...]
    turn: Turn
    num_heads: int
    is_head_major: bool  # of y: [1, H, T, D]
    x_is_head_major: bool


def find_rotary(graph_module: fx.GraphModule) -> None:
    """Put doubleweave.rotary in the place of every rotary embedding that is found."""
    graph = graph_module.graph
    of_positions = from_positions(graph)
    evaluator = Evaluator(graph_module)
    found: list[_Found] = []
    done: set[Any] = set()
    for node in nodes_of(graph):
        # Where features meet a table, for the first time on the way.
        if node in done or node in of_positions or not is_call(node, aten.mul.Tensor):
            continue
        data = [source for source in node.all_input_nodes if source not in of_positions]
        if len(data) != 1 or len(node.all_input_nodes) != 2 or data[0].op == "get_attr":
            continue
        if (match := _match(data[0], of_positions, evaluator)) is not None:
            found.append(match)
            done |= match.inside
    kept = _orders_that_stay(found)
    tables: dict[Any, Any] = {}
    for match in found:
        _replace(graph_module, match, match.y in kept, tables)
    graph.eliminate_dead_code()


def _match(data: Any, of_positions: Set[Any], evaluator: Evaluator) -> _Found | None:
    """The smallest piece behind the furthest x from which `data` is moved features."""
    sources = [data]
    while is_call(sources[-1], *MOVES):
        tensors = {node for node in sources[-1].all_input_nodes if is_tensor(node)}
        if len(tensors) != 1:
            break
        sources.append(tensors.pop())
    for x in reversed(sources):
        for y, inside in _results(x, of_positions):
            if (match := _matches(x, y, inside, of_positions, evaluator)) is not None:
                return match
    return None


def _results(x: Any, of_positions: Set[Any]) -> Iterator[tuple[Any, frozenset[Any]]]:
    """(y, the nodes on the way) for each node of x's size that follows from x and tables alone, nearest first."""
    inside: dict[Any, frozenset[Any]] = {x: frozenset()}
    turned: set[Any] = set()
    todo, at = [x], 0
    order = {node: index for index, node in enumerate(x.graph.nodes)}
    while at < len(todo) and len(inside) <= _MOST_NODES:
        users = [user for node in todo[at:] for user in node.users if user not in inside]
        at = len(todo)
        for user in sorted(set(users), key=order.__getitem__):
            tensors = [node for node in user.all_input_nodes if is_tensor(node) and node.op != "get_attr"]
            known = all(node in inside or node in of_positions for node in tensors)
            if user.op != "call_function" or user.target in ATTENTIONS or not is_tensor(user) or not known:
                continue
            inside[user] = frozenset({user}).union(*(inside[node] for node in tensors if node in inside))
            todo.append(user)
            if any(node in of_positions or node in turned for node in tensors):
                turned.add(user)
                if len(user.meta["val"].shape) == 4 and _count(user) == _count(x):
                    yield user, inside[user]
        # A node whose inputs were not all known yet is tried again when the next of them is.


def _count(node: Any) -> Any:
    return expression(node.meta["val"].numel())


def _matches(
    x: Any, y: Any, inside: frozenset[Any], of_positions: Set[Any], evaluator: Evaluator
) -> _Found | None:
    if {node.meta["val"].dtype for node in (x, y)} != {torch.float32}:
        return None
    _, first, second, width = y.meta["val"].shape
    is_head_major = expression(second) == evaluator.symbol
    if not is_head_major and expression(first) != evaluator.symbol:
        return None
    num_heads = first if is_head_major else second
    if not isinstance(num_heads, int) or not _is_layout(x, num_heads, width, evaluator.symbol):
        return None
    tables = _tables(y, inside, of_positions)
    shapes = [table.meta["val"].shape for table in tables]
    if not tables or not all(len(s) == 3 and expression(s[1]) == evaluator.symbol for s in shapes):
        return None
    if not all(table.meta["val"].dtype == torch.float32 for table in tables):
        return None
    probe = _Probe(x, y, tables, num_heads, int(width), is_head_major, evaluator)
    try:
        turn = probe.turn()
    except (RuntimeError, IndexError, TypeError):  # an operator that asks for other numbers of rows
        return None
    if turn is None:
        return None
    x_is_head_major = _rows_axis(x, evaluator.symbol) == 2
    return _Found(x, y, inside, tables, turn, num_heads, is_head_major, x_is_head_major)


def _is_layout(x: Any, num_heads: int, width: int, symbol: Any) -> bool:
    sizes = [expression(size) for size in x.meta["val"].shape]
    return sizes in (
        [1, symbol, num_heads * width],
        [1, symbol, num_heads, width],
        [1, num_heads, symbol, width],
    )


def _tables(y: Any, inside: frozenset[Any], of_positions: Set[Any]) -> tuple[Any, ...]:
    """What the piece reads that follows from positions."""
    found: dict[Any, None] = {}
    for node in (node for node in y.graph.nodes if node in inside):
        for source in filter(is_tensor, node.all_input_nodes):
            if source in of_positions:
                found[_table_behind(source)] = None
    return tuple(found)


def _table_behind(node: Any) -> Any:
    """The table [1, T, R] whose numbers `node` has: before they are unsqueezed, repeated and sliced."""
    while is_call(node, *MOVES):
        tensors = set(filter(is_tensor, node.all_input_nodes))
        if len(tensors) != 1 or (len(node.meta["val"].shape) == 3 and not is_call(node, aten.slice.Tensor)):
            break
        node = tensors.pop()
    return node


@dataclass(frozen=True)
class _Probe:
    """Evaluates a piece between x and y for numbers of our choice."""

    x: Any
    y: Any
    tables: tuple[Any, ...]
    num_heads: int
    width: int
    is_head_major: bool
    evaluator: Evaluator

    def turn(self) -> Turn | None:
        """The turn that the piece is, None where it is none."""
        generator = torch.Generator().manual_seed(20261)
        rows = self.width
        # A head's feature i alone in row i, and other numbers in each head: no head may reach another.
        factors = torch.arange(1.0, self.num_heads + 1)
        x_BTHD = torch.eye(rows)[None, :, None, :] * factors[:, None]
        one = [
            torch.rand(int(table.meta["val"].shape[2]), generator=generator) + 0.5 for table in self.tables
        ]
        y_BTHD = self.result(x_BTHD, [row.expand(1, rows, -1) for row in one])
        matrix = y_BTHD[0, :, 0, :].T
        turn = turn_of(matrix, one)
        if turn is None or not _is_simple(turn):
            return None
        rows = 5
        x_BTHD = torch.randn(1, rows, self.num_heads, self.width, generator=generator)
        tables = [torch.randn(1, rows, len(row), generator=generator) for row in one]
        found, wanted = apply(turn, x_BTHD, tables), self.result(x_BTHD, tables)
        return turn if torch.allclose(found, wanted, rtol=1e-5, atol=1e-5) else None

    def result(self, x_BTHD: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """y as [1, T, H, D]."""
        rows = x_BTHD.shape[1]
        sizes = [self.evaluator.size(size, rows) for size in self.x.meta["val"].shape]
        is_head_major = _rows_axis(self.x, self.evaluator.symbol) == 2
        x = x_BTHD.transpose(1, 2) if is_head_major else x_BTHD.reshape(sizes)
        known = {self.x: x, **dict(zip(self.tables, tables, strict=True))}
        y: Tensor = self.evaluator.values([self.y], rows, known)[self.y]
        return y.transpose(1, 2) if self.is_head_major else y


def _is_simple(turn: Turn) -> bool:
    """Whether both tables and all orders of features can be made in a few operators."""
    orders = [turn.inputs, inverse(turn.outputs)]
    for columns in (turn.cos, turn.sin):
        orders.append(tuple(c.column for c in columns))
        if len({(c.table, c.sign) for c in columns}) != 1:
            return False
    return all(_interleaved(order) or len(_runs(order)) <= _MOST_SLICES for order in orders)


def _rows_axis(node: Any, symbol: Any) -> int:
    return [expression(size) for size in node.meta["val"].shape].index(symbol)


def apply(turn: Turn, x_BTHD: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The turn by our operator, with its orders of features."""
    num_heads, rows = x_BTHD.shape[2], x_BTHD.shape[1]
    cos, sin = (
        torch.stack([tables[c.table][..., c.column] * c.sign for c in columns], -1)
        for columns in (turn.cos, turn.sin)
    )
    flat = x_BTHD[..., list(turn.inputs)].reshape(1, rows, -1)
    turned = torch.ops.doubleweave.rotary(flat, cos, sin, num_heads).view(x_BTHD.shape)
    result: Tensor = turned[..., list(inverse(turn.outputs))]
    return result


def _orders_that_stay(found: Sequence[_Found]) -> set[Any]:
    """The results whose features need not be put back: queries and keys that meet in the same order."""
    by_y = {match.y: match for match in found}
    graph = found[0].y.graph if found else fx.Graph()
    meetings = [
        tuple(_behind(node.args[at], by_y) for at in (0, 1))
        for node in graph.nodes
        if node.target in ATTENTIONS
    ]
    kept = {
        y
        for y, match in by_y.items()
        if not natural(match.turn.outputs) and _reaches_scores(y, len(match.turn.outputs))
    }
    while True:
        apart = {
            y
            for q, k in meetings
            for y in (q, k)
            if y in kept and not (q in kept and k in kept and by_y[q].turn.outputs == by_y[k].turn.outputs)
        }
        if not apart:
            return kept
        kept -= apart


def _keeps_features(node: Any) -> Any:
    """The tensor whose features `node` has in their order: views over heads, and products with a number or a row's."""
    if is_call(node, *_KEEPS_FEATURES):
        return node.args[0]
    if is_call(node, aten.mul.Tensor) and _is_factor(node.args[1]):
        return node.args[0]
    return None


def _is_factor(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return True
    sizes = node.meta["val"].shape if is_tensor(node) else ()
    return not sizes or sizes[-1] == 1


def _behind(node: Any, by_y: dict[Any, _Found]) -> Any:
    while node is not None and node not in by_y:
        node = _keeps_features(node)
    return node


def _reaches_scores(node: Any, width: int) -> bool:
    """Whether nothing but attention reads what has the features of `node`, as queries or keys of this width."""
    if node.meta["val"].shape[-1] % width:
        return False
    for user in filter(is_tensor, node.users):
        if is_call(user, *ATTENTIONS):
            q, k, v, num_heads, num_kv_heads = user.args[:5]
            widths = q.meta["val"].shape[2] // num_heads, k.meta["val"].shape[2] // num_kv_heads
            if widths != (width, width) or v is node:
                return False
        elif _keeps_features(user) is not node or not _reaches_scores(user, width):
            return False
    return True


def _replace(graph_module: fx.GraphModule, match: _Found, stays: bool, tables: dict[Any, Any]) -> None:
    graph, turn, y = graph_module.graph, match.turn, match.y
    cos, sin = (_table(graph, match, columns, tables) for columns in (turn.cos, turn.sin))
    width = int(y.meta["val"].shape[3])
    with graph.inserting_before(y):
        x = match.x
        if not natural(turn.inputs) and (linear := _reordered(graph_module, match)) is not None:
            x, is_ordered = linear, True
        else:
            is_ordered = natural(turn.inputs)
        if match.x_is_head_major:
            x = insert(graph, aten.transpose.int, x, 1, 2, like=y)
        num_tokens = insert(graph, aten.sym_size.int, x, 1, like=y)
        flat_shape = [1, num_tokens, match.num_heads * width]
        shape = [1, num_tokens, match.num_heads, width]
        if not is_ordered:
            heads = insert(graph, aten.reshape.default, x, shape, like=y)
            x = _ordered(graph, heads, turn.inputs, y)
        flat = insert(graph, aten.reshape.default, x, flat_shape, like=y)
        turned = insert(graph, torch.ops.doubleweave.rotary.default, flat, cos, sin, match.num_heads, like=y)
        result = insert(graph, aten.view.default, turned, [1, num_tokens, match.num_heads, -1], like=y)
        if not stays and not natural(turn.outputs):
            result = _ordered(graph, result, inverse(turn.outputs), y)
        if match.is_head_major:
            result = insert(graph, aten.transpose.int, result, 1, 2, like=y)
    y.replace_all_uses_with(result)


def _reordered(graph_module: fx.GraphModule, match: _Found) -> Any:
    """The projection with its rows in the order of the turn; None where x is none, or is read by others too."""
    x, graph = match.x, graph_module.graph
    if not is_call(x, aten.linear.default) or any(is_tensor(u) and u not in match.inside for u in x.users):
        return None
    if any(source.op != "get_attr" for source in x.args[1:] if source is not None):
        return None
    width = len(match.turn.inputs)
    rows = torch.arange(match.num_heads)[:, None] * width + torch.tensor(match.turn.inputs)
    constants = []
    for source, kind in zip(x.args[1:], ("weight", "bias"), strict=False):
        if source is None:
            continue
        name = f"_{x.name}_ordered_{kind}"
        graph_module.register_buffer(name, constant(graph_module, source)[rows.flatten()].clone())
        constants.append(graph.get_attr(name))
        constants[-1].meta["val"] = source.meta["val"]
    return insert(graph, aten.linear.default, x.args[0], *constants, like=x)


def _table(graph: fx.Graph, match: _Found, columns: tuple[Column, ...], made: dict[Any, Any]) -> Any:
    """The node of a table of these columns, beside the one that it is made from, once for all layers."""
    sources, signs = ({getattr(c, name) for c in columns} for name in ("table", "sign"))
    source, sign = match.tables[sources.pop()], signs.pop()
    order = tuple(c.column for c in columns)
    if (key := (source, sign, order)) not in made:
        with graph.inserting_before(source.next):
            width = int(source.meta["val"].shape[-1])
            found = source if order == tuple(range(width)) else _ordered(graph, source, order, source)
            made[key] = insert(graph, aten.neg.default, found, like=source) if sign < 0 else found
    return made[key]


def _ordered(graph: fx.Graph, x: Any, order: Sequence[int], like: Any) -> Any:
    """x with its last axis in this order."""
    sizes = x.meta["val"].shape
    last = len(sizes) - 1
    if half := _interleaved(order):
        halves = [insert(graph, aten.slice.Tensor, x, last, at, at + half, like=like) for at in (0, half)]
        pairs = insert(graph, aten.stack.default, halves, last + 1, like=like)
        turned = insert(graph, aten.flatten.using_ints, pairs, last, last + 1, like=like)
        if 2 * half == len(order):
            return turned
        rest = insert(graph, aten.slice.Tensor, x, last, 2 * half, len(order), like=like)
        return insert(graph, aten.cat.default, [turned, rest], last, like=like)
    parts = []
    for run in _runs(order):
        step = run[1] - run[0] if len(run) > 1 else 1
        parts.append(insert(graph, aten.slice.Tensor, x, last, run[0], run[-1] + 1, step, like=like))
    return insert(graph, aten.cat.default, parts, last, like=like) if len(parts) > 1 else parts[0]


def _interleaved(order: Sequence[int]) -> int:
    """The number of pairs where the order puts two halves between one another and leaves the rest; 0 for another."""
    half = order[1] if len(order) > 3 else 0
    wanted = [at for pair in zip(range(half), range(half, 2 * half), strict=True) for at in pair]
    is_so = half > 1 and list(order) == [*wanted, *range(2 * half, len(order))]
    return half if is_so else 0


def _runs(order: Sequence[int]) -> list[list[int]]:
    """The order as runs that go up in equal steps, each of which is one slice."""
    runs: list[list[int]] = []
    for number in order:
        run = runs[-1] if runs else []
        if run and number > run[-1] and (len(run) == 1 or number - run[-1] == run[-1] - run[-2]):
            run.append(number)
        else:
            runs.append([number])
    return runs
