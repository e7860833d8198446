"""Refusals of a module and its arguments."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import doubleweave as dw
from refusals.provoke import (
    Case,
    Counter,
    One,
    Rows,
    Scale,
    T,
    X,
    append,
    branch,
    change,
    counts,
    grow,
    inner,
    keep_first,
    linear,
    model,
    prints,
    remember,
    resize,
    rows,
    shared_state,
    split,
    train,
    whole,
)

MODULE = [
    Case(
        "module_type",
        "The module is none",
        lambda: dw.compile(torch.relu, (X,)),
        "PolicyError: module: found a builtin_function_or_method, expected a torch.nn.Module",
        "Put the function into the `forward` of a module.",
    ),
    Case(
        "kwargs_type",
        "`kwargs` is no dict",
        lambda: dw.compile(linear(), (), [X]),
        "PolicyError: kwargs: found a list, expected a dict",
        'Write `{"input": x}`.',
    ),
    Case(
        "args_type",
        "`args` is no tuple",
        lambda: dw.compile(linear(), X),
        "PolicyError: args: found a Tensor, expected a tuple of arguments",
        "Write `(x,)`.",
    ),
    Case(
        "args_missing",
        "Arguments do not fit `forward`",
        lambda: split(linear()),
        "PolicyError: Linear: missing a required argument: 'input'",
        "Pass what `forward` takes, in `args` and `kwargs`.",
    ),
    Case(
        "args_kind",
        "An argument of another kind",
        lambda: split(linear(), {X}),
        "SplitError: Linear: argument input is a set, expected tensors, numbers, strings, None, "
        "and tuples, lists, dicts, named tuples and dataclasses of them",
        "Pass tensors and constants.",
    ),
    Case(
        "args_dtype",
        "A tensor of another dtype or device",
        lambda: split(nn.Identity(), X.to(torch.complex64)),
        "SplitError: Identity: input is complex64 on cpu, expected a tensor on the CPU of "
        "float32, float64, float16, bfloat16, int64, int32, int16, int8, uint8, bool",
        "Convert it before; complex numbers as two real ones.",
    ),
    Case(
        "args_empty",
        "A tensor without elements",
        lambda: split(nn.Identity(), rows(0, 4)),
        "SplitError: Identity: input is empty, [0, 4], expected at least one element",
        "Give an example with at least one row.",
    ),
    Case(
        "call_arguments",
        "A nested module is called with arguments that do not fit",
        lambda: inner(model(lambda self, x: self.inner(), inner=Scale()), X),
        "PolicyError: 'inner', called at model.py:12, in <lambda>: missing a required argument: 'x'",
        "The module would not run in eager torch either.",
    ),
    Case(
        "call_kind",
        "A nested module gets an argument of another kind",
        lambda: inner(model(lambda self, x: self.inner(x, {2}), inner=Scale()), X),
        "SplitError: 'inner', called at model.py:12, in <lambda>: argument n is a set, expected "
        "tensors, numbers, strings, None, and tuples, lists, dicts, named tuples and dataclasses "
        "of them",
        "Name the module around it instead.",
    ),
    Case(
        "call_size",
        "A nested module gets a size that varies",
        lambda: inner(Rows(Scale()), X, dims={"x": {0: T}}),
        "SplitError: 'inner', called at model.py:12, in forward: argument n is a size that "
        "varies from call to call; take it from a tensor's shape inside the module, or pass a "
        "tensor",
        "Take the size inside, from a tensor's shape.",
    ),
    Case(
        "result_kind",
        "`forward` returns something else",
        lambda: whole(lambda self, x: {x}),
        "SplitError: Model: its result: found a set, expected tensors, numbers, strings, None, "
        "and tuples, lists, dicts, named tuples and dataclasses of them",
        "Return tensors and constants.",
    ),
    Case(
        "result_size",
        "`forward` returns a size that varies",
        lambda: split(model(lambda self, x: (x, x.shape[0])), X, dims={"x": {0: T}}),
        "SplitError: Model: its result[1] is a size that varies from call to call; leave it "
        "out, its caller has the shapes",
        "The caller has the shape; leave the size out.",
    ),
    Case(
        "result_none",
        "`forward` returns no tensor",
        lambda: whole(lambda self, x: None),
        "SplitError: Model: returns no tensor; expected at least one",
        "Return what it computes.",
    ),
    Case(
        "call_result_kind",
        "A nested module returns something else",
        lambda: inner(One(model(lambda self, x: {x})), X),
        "SplitError: 'inner', called at model.py:12, in forward: its result: found a set, "
        "expected tensors, numbers, strings, None, and tuples, lists, dicts, named tuples and "
        "dataclasses of them",
        "Name the module around it instead.",
    ),
    Case(
        "call_result_none",
        "A nested module returns no tensor",
        lambda: inner(model(lambda self, x: (x, self.inner(x)), inner=model(lambda self, x: None)), X),
        "SplitError: 'inner', called at model.py:12, in <lambda>: returns no tensor; name the "
        "module around it in the policy instead",
        "Name the module around it instead.",
    ),
    Case(
        "raises",
        "`forward` raises, or does what `torch.export` cannot follow",
        lambda: whole(lambda self, x: x @ x),
        "SplitError: Model: torch.export cannot trace it: RuntimeError (a and b must have same "
        "reduction dim, but got [3, 4] X [3, 4])",
        "Run the module in eager torch with these arguments, then through `torch.export.export`.",
    ),
    Case(
        "value_dependent",
        "A Python `if` on a tensor's value",
        lambda: whole(lambda self, x: x if x.sum() > 0 else -x),
        "SplitError: Model: an if, a loop or an index at model.py:12, in <lambda>, depends on "
        "the values of a tensor, which a program cannot follow; use torch.where, or take it "
        "outside the module",
        "Use `torch.where`.",
    ),
    Case(
        "control_flow",
        "`torch.cond` and the like",
        lambda: whole(branch),
        "SplitError: Model: has cond (data-dependent control flow), which a segment cannot hold; "
        "take the branch outside the module",
        "Branch outside, between two programs or two named modules.",
    ),
    Case(
        "data_dependent_size",
        "A size that depends on values",
        lambda: whole(lambda self, x: x[x > 0]),
        "SplitError: a size depends on the values of a tensor, expected sizes that follow from "
        "the inputs' shapes; keep the size and mask instead",
        "Keep the size, and mask.",
    ),
    Case(
        "size_expression",
        "A size that follows from the inputs' sizes by more than integer arithmetic",
        lambda: split(
            model(lambda self, x: F.interpolate(x[None, None], scale_factor=1.5)), X, dims={"x": {0: T}}
        ),
        "SplitError: a size follows from T by more than integer arithmetic (+, -, *, //, %, "
        "max, min); compute it with integers, or keep that axis fixed",
        "Keep that axis fixed, or compute with integers: `x.shape[0] * 3 // 2`.",
    ),
    Case(
        "token",
        "`forward` does something outside of tensors, such as printing",
        lambda: whole(prints),
        "SplitError: Model: does something beside computing tensors, such as printing, which a "
        "program cannot; take it out",
        "Take it out.",
    ),
    Case(
        "random",
        "Dropout in training mode, or another random operator",
        lambda: split(model(train), X),
        "SplitError: Model: aten.native_dropout.default draws random numbers; call module.eval() "
        "before compiling, or take the randomness as an argument",
        "Call `module.eval()`, or take the random tensor as an argument.",
    ),
    Case(
        "in_place",
        "`forward` changes an argument",
        lambda: whole(change),
        "SplitError: Model: changes its argument in place; expected a module that leaves its "
        "arguments as they are: write into a clone",
        "Begin with `x = x.clone()`.",
    ),
    Case(
        "batch_norm",
        "Batch norm in training mode",
        lambda: whole(lambda self, x: self.norm(x), norm=nn.BatchNorm1d(4)),
        "SplitError: Model: has a batch norm in training mode, whose statistics are those of "
        "each call; call module.eval() before compiling",
        "Call `module.eval()`.",
    ),
    Case(
        "kept_list",
        "`forward` changes a list or a dict of the module",
        lambda: whole(append, kept=[]),
        "SplitError: Model: forward changes the list 'kept', which a program does not "
        "remember; make it a buffer with register_buffer",
        "What is kept from call to call is a buffer of a fixed size.",
    ),
    Case(
        "kept_new",
        "`forward` leaves something in an attribute that its next call reads",
        lambda: whole(keep_first, last=None),
        "SplitError: Model: a second call gives other results, by what forward left in 'last', "
        "which a program does not remember; make it a buffer with register_buffer",
        "Make it a buffer. (An attribute that is only written is left as it was, and refused nothing.)",
    ),
    Case(
        "argument_array",
        "An example argument of another library",
        lambda: split(linear(), X.numpy()),
        "PolicyError: Linear: argument input is a ndarray, expected a torch.Tensor: a module "
        "runs in torch when it is compiled; use torch.as_tensor",
        "Convert the example; the program itself takes NumPy and JAX arrays too.",
    ),
    Case(
        "python_state",
        "`forward` changes a Python number or text of the module",
        lambda: whole(counts, count=0),
        "SplitError: Model: forward sets 'count' to 1, which a program does not remember; make "
        "it a buffer with register_buffer",
        'What changes is a buffer: `self.register_buffer("count", torch.tensor(0))`.',
    ),
    Case(
        "parameter_changed",
        "`forward` changes a parameter",
        lambda: whole(grow, weight=nn.Parameter(torch.zeros(4), requires_grad=False)),
        "SplitError: Model: changes 'weight' in forward, expected a buffer; make it one with register_buffer",
        "What changes is a buffer.",
    ),
    Case(
        "buffer_size",
        "A buffer gets another size",
        lambda: whole(resize, total=nn.Buffer(torch.zeros(4))),
        "SplitError: buffer 'total' of Model: torch.float32[4] becomes torch.float32[8] in "
        "forward; expected a state of one size and dtype",
        "Make it as large as it can become, and keep how much of it counts in a second buffer.",
    ),
    Case(
        "leak",
        "A tensor leaves a nested module by another way than its result",
        lambda: inner(model(lambda self, x: self.inner(x) + self.inner.last, inner=model(remember)), X),
        "SplitError: Model: a tensor computed inside 'inner' is used outside it "
        "(aten.mul.Tensor) without being returned; return it from that module's forward (what a "
        "forward hook of it computes counts as outside)",
        "Return it. (A forward hook on a nested module is such a way too: name the module around it.)",
    ),
    Case(
        "state_inside_and_outside",
        "A module with state is shared by a named module and one around or beside it",
        lambda: shared_state(),
        "SplitError: Model: changes buffer 'counter.total', which is also 'inner.inner.total' "
        "in 'inner'; name the module that has the buffer in the policy",
        "Name the shared module too.",
    ),
    Case(
        "buffer_of_another",
        "A buffer that a nested module changes is used outside it",
        lambda: inner(model(lambda self, x: self.inner.total * 2 + self.inner(x), inner=Counter()), X),
        "SplitError: Model: uses buffer 'inner.total', which 'inner' changes; return it from "
        "there, or name the module that has the buffer in the policy",
        "Return it from the nested module.",
    ),
]
