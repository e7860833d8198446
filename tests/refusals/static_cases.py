"""Refusals of static modules."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from doubleweave import Dynamic, Static
from refusals.provoke import (
    Case,
    Counter,
    Doubles,
    One,
    T,
    Two,
    X,
    chunked,
    fc,
    inner,
    linear,
    model,
    rows,
    split,
    swap,
    two_pieces,
)

STATIC = [
    Case(
        "static_varies",
        "A `Static` module without chunks is called with sizes that vary",
        lambda: inner(One(linear()), X, rule=Static(), dims={"x": {0: T}}),
        "PolicyError: 'inner', called at model.py:12, in forward: axis 0 of input is 1 to 64, "
        "but 'inner' makes it Static(), which needs a fixed size; cut it into chunks with "
        'chunk={"input": 0}, or make the module Dynamic',
        "Cut the axis into chunks, or make the module `Dynamic`.",
    ),
    Case(
        "static_whole_varies",
        "The whole module is `Static` without chunks, and `dynamic_shapes` let it vary",
        lambda: split(linear(), X, policy={"": Static()}, dims={"input": {0: T}}),
        "PolicyError: 'glue_0': the policy's '' makes it Static(), but sizes in it vary (T "
        "from 1 to 64); name the axes to cut with chunk={…}, or make it Dynamic()",
        'Cut the axis into chunks: `{"": Static(chunk={"x": 0})}`.',
    ),
    Case(
        "chunk_unknown",
        "`chunk` names no tensor",
        lambda: fc(Static(chunk={"x": 0})),
        "PolicyError: 'fc': chunk names 'x', expected one of its tensors: input",
        "Names are those of the parameters of this module's `forward`; `xs[0]`, `d['a']` inside lists and dicts.",
    ),
    Case(
        "chunk_axis",
        "`chunk` names an axis that the tensor does not have",
        lambda: fc(Static(chunk={"input": 2})),
        "PolicyError: 'fc': chunk={'input': 2}, but input has 2 axes, 0 to 1",
        "Axes count from 0; -1 is the last one.",
    ),
    Case(
        "chunk_sizes_differ",
        "Arguments that are cut have different numbers of rows",
        lambda: inner(Two(Doubles()), X, rows(5, 4), rule=Static(chunk={"a": 0, "b": 0})),
        "PolicyError: 'inner', called at model.py:12, in forward: the axes to cut into chunks "
        "have sizes 3, 5, expected the same for all of a, b",
        "Cut only arguments that have the same rows.",
    ),
    Case(
        "chunk_whole_sizes_differ",
        "Arguments of the whole module that are cut have different numbers of rows",
        lambda: split(Doubles(), X, rows(5, 4), policy={"": Static(chunk={"a": 0, "b": 0})}),
        "PolicyError: Doubles: dim 'T' stands for axis 0 of a, which is 3, and for axis 0 of b, "
        'which is 5: one Dim means equal sizes, so give them two; dims that would work: {"a": '
        '{0: m}, "b": {0: k}}, m from 1 to 3, k from 1 to 5',
        "Cut only arguments that have the same rows.",
    ),
    Case(
        "chunk_whole_dim",
        "The whole module is cut along an axis that `dynamic_shapes` leave to torch",
        lambda: split(linear(), X, policy={"": Static(chunk={"input": 0})}, dims={"input": {0: Dim.AUTO}}),
        "PolicyError: Linear: axis 0 of input is cut into chunks, and needs a "
        "torch.export.Dim(name, min=…, max=…) in dynamic_shapes",
        "Give the axis a `Dim` with a range.",
    ),
    Case(
        "chunk_shape",
        "A result has no axis of rows, or more than one",
        lambda: chunked(lambda self, x: x.sum(0)),
        "SplitError: 'inner': its result inner has shape [4], expected one axis of T rows, as "
        "many as go in: it cannot run chunk by chunk; make it Dynamic",
        "What adds up rows belongs in a `Dynamic` module around or beside this one.",
    ),
    Case(
        "rows_made",
        "Rows depend on how many there are",
        lambda: chunked(lambda self, x: x + torch.arange(x.shape[0])[:, None]),
        "SplitError: 'inner': its rows depend on one another (aten.arange is made from the "
        "number of rows), so it cannot be cut there; cut another axis, or make it Dynamic",
        "Take positions as an argument and cut them too.",
    ),
    Case(
        "rows_combined",
        "Each row meets each",
        lambda: chunked(lambda self, x: (x[:, None] * x[None]).sum(1)),
        "SplitError: 'inner': its rows depend on one another (aten.mul.Tensor combines rows with "
        "other rows), so it cannot be cut there; cut another axis, or make it Dynamic",
        "Make what mixes rows a `Dynamic` module of its own.",
    ),
    Case(
        "rows_as_weights",
        "Rows are the weights of an operator",
        lambda: chunked(lambda self, x: F.linear(torch.ones(2, 4), x)),
        "SplitError: 'inner': its rows depend on one another (aten.linear uses rows as weights), "
        "so it cannot be cut there; cut another axis, or make it Dynamic",
        "As above.",
    ),
    Case(
        "rows_product",
        "A product over the rows",
        lambda: chunked(lambda self, x: x @ (x.t() @ x)),
        "SplitError: 'inner': its rows depend on one another (aten.matmul adds up along the "
        "rows, or combines each with each), so it cannot be cut there; cut another axis, or make "
        "it Dynamic",
        "As above.",
    ),
    Case(
        "rows_over",
        "An operator over the rows",
        lambda: chunked(lambda self, x: x.softmax(0)),
        "SplitError: 'inner': its rows depend on one another (aten.softmax.int is over the "
        "rows), so it cannot be cut there; cut another axis, or make it Dynamic",
        "As above, or cut another axis.",
    ),
    Case(
        "rows_all_axes",
        "An operator over all axes",
        lambda: chunked(lambda self, x: x - x.sum()),
        "SplitError: 'inner': its rows depend on one another (aten.sum is over all axes), so it "
        "cannot be cut there; cut another axis, or make it Dynamic",
        "As above.",
    ),
    Case(
        "rows_dropped",
        "The axis of the rows goes",
        lambda: chunked(lambda self, x: x.squeeze(0)),
        "SplitError: 'inner': its rows depend on one another (aten.squeeze.dim drops the axis of "
        "the rows), so it cannot be cut there; cut another axis, or make it Dynamic",
        "Keep the axis.",
    ),
    Case(
        "rows_joined",
        "Rows are joined with something that has none",
        lambda: chunked(lambda self, x: torch.cat((x, torch.ones(1, 4)))[1:]),
        "SplitError: 'inner': its rows depend on one another (aten.cat joins rows with tensors "
        "that have none), so it cannot be cut there; cut another axis, or make it Dynamic",
        "Join them outside.",
    ),
    Case(
        "rows_picked",
        "Some rows are picked",
        lambda: chunked(lambda self, x: x + x[0]),
        "SplitError: 'inner': its rows depend on one another (aten.select.int is along the "
        "rows), so it cannot be cut there; cut another axis, or make it Dynamic",
        "Pick them outside, and pass what was picked as an argument that is not cut.",
    ),
    Case(
        "rows_looked_up",
        "Rows are a table to look up in",
        lambda: chunked(lambda self, x: x + F.embedding(torch.tensor([0, 1]), x).sum(0)),
        "SplitError: 'inner': its rows depend on one another (aten.embedding looks up in the "
        "rows), so it cannot be cut there; cut another axis, or make it Dynamic",
        "Look up outside.",
    ),
    Case(
        "rows_attention",
        "Attention over the rows",
        lambda: chunked(lambda self, x: F.scaled_dot_product_attention(x, x, x), rows(1, 6, 4), 1),
        "SplitError: 'inner': its rows depend on one another (aten.scaled_dot_product_attention "
        "attends from rows to rows), so it cannot be cut there; cut another axis, or make it "
        "Dynamic",
        "Make the attention a `Dynamic` module of its own, nested in this one.",
    ),
    Case(
        "rows_unknown",
        "An operator that is not known to keep rows apart",
        lambda: chunked(lambda self, x: x.as_strided((x.shape[0], 4), (4, 1)).relu()),
        "SplitError: 'inner': cannot show that its rows are independent (they are not followed "
        "through aten.as_strided), so it cannot run chunk by chunk; make it Dynamic",
        "Name the module around it `Dynamic`, or keep rows on an axis of their own.",
    ),
    Case(
        "rows_numbers",
        "With state, chunks one after the other give other numbers than all rows at once",
        lambda: chunked(lambda self, x: x.flip(0) + self.total.add_(1), total=nn.Buffer(torch.zeros(4))),
        "SplitError: 'inner': chunk by chunk it gives other numbers than at once "
        "(inner.total.next by 1 with 2 rows in chunks of 1): its rows depend on one another; "
        "make it Dynamic",
        "Make it `Dynamic`.",
    ),
    Case(
        "rows_cannot_run",
        "Chunks cannot be tried",
        lambda: chunked(
            lambda self, x: x + x.index_select(0, torch.tensor([2])) + self.total.add_(1),
            total=nn.Buffer(torch.zeros(4)),
        ),
        "SplitError: 'inner': chunk by chunk it gives other numbers than at once (it cannot be "
        "tried: IndexError: index out of range in self): its rows depend on one another; make it "
        "Dynamic",
        "Make it `Dynamic`.",
    ),
    Case(
        "state_sizes",
        "Chunks change a state, and 1 is not among their sizes",
        lambda: inner(One(Counter()), X, rule=Static(chunk={"x": 0}, sizes=(4, 16)), dims={"x": {0: T}}),
        "SplitError: 'inner': has state, which padding must not reach, so that chunks must add "
        "up exactly: expected 1 among its sizes, found 4, 16",
        "Add 1 to `sizes`: padding must not reach a state, so chunks have to add up.",
    ),
    Case(
        "state_swapped",
        "Chunks swap states",
        lambda: split(
            model(swap, a=nn.Buffer(torch.zeros(4)), b=nn.Buffer(torch.zeros(4))),
            X,
            dims={"x": {0: T}},
            policy={"": Static(chunk={"x": 0}, sizes=(1, 4))},
        ),
        "SplitError: 'glue_0': state 'a' becomes another state, or the same as one, which chunk "
        "by chunk is something else than at once; make it Dynamic",
        "Make the module that changes them `Dynamic`.",
    ),
    Case(
        "state_two_segments",
        "Chunks change a state that another segment uses too",
        lambda: split(
            model(two_pieces, fc=linear(), total=nn.Buffer(torch.zeros(4))),
            X,
            dims={"x": {0: T}},
            policy={"": Static(chunk={"x": 0}, sizes=(1, 4)), "fc": Dynamic()},
        ),
        "SplitError: 'glue_0': changes state 'total' chunk by chunk, and 2 segments use it; name "
        "the module that changes it in the policy by itself, or make it Dynamic",
        "Put what uses the state into one module, and name that.",
    ),
]
