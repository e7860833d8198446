"""Refusals where a program is written, and called."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import doubleweave as dw
from refusals.provoke import (
    Case,
    X,
    call,
    delete_state,
    out,
    out_in_use,
    program,
    results,
    rows,
    set_state,
    set_threads,
    under_a_file,
    whole,
)

WRITING = [
    Case(
        "lower",
        "The backend cannot lower an operator",
        lambda: whole(lambda self, x: torch.linalg.lu_factor(x[:, :3])[0]),
        "LowerError: segment glue_0: xnnpack cannot lower it (AttributeError: 'WithEffects' "
        "object has no attribute '_schema')",
        "Take the operator out, or replace it.",
    ),
    Case(
        "no_kernel",
        "The runtime does not have an operator",
        lambda: whole(lambda self, x: torch.linalg.svd(x)[1]),
        "LowerError: segment glue_0: ExecuTorch has no kernel for aten._linalg_svd.U; replace "
        "the operator, or take it out of the model",
        "Take the operator out, or replace it.",
    ),
    Case(
        "out_type",
        "`out` is no path",
        lambda: dw.compile(nn.ReLU(), (X,), out=3),
        "PolicyError: out: found 3, expected the path of a folder to write",
        "Give the path of a folder, or leave it out.",
    ),
    Case(
        "out_file",
        "`out` is a file",
        lambda: out("file", ""),
        "LowerError: file: is a file, expected a folder to write; choose another one with out=",
        "Give a folder.",
    ),
    Case(
        "out_other_files",
        "`out` has other files in it",
        lambda: out("notes/todo.txt", ""),
        "LowerError: notes: is a folder with other files in it, expected an empty or missing "
        "folder or an older program; choose another one with out=",
        "Give a folder that is new, empty, or has an older program.",
    ),
    Case(
        "out_parent",
        "`out` cannot be made",
        under_a_file,
        "LowerError: file/program: cannot be made: File exists; choose another folder with out=",
        "Give a folder that you may write.",
    ),
    Case(
        "out_in_use",
        "`out` cannot be replaced, here the working folder",
        out_in_use,
        "LowerError: .: cannot be written: Device or resource busy; choose another folder with out=",
        "Give a folder that no program uses.",
    ),
]

CALLING = [
    Case(
        "call_missing",
        "An argument is missing, unknown or one too many",
        lambda: call(x="leave"),
        "InputError: Called: missing a required argument: 'x'; expected Called(x, ids, pair, "
        "n=2, y=..., *, mask=None, config=...)",
        "`inspect.signature(program.methods[name])` has what it takes.",
    ),
    Case(
        "call_missing_behind_default",
        "The same, behind arguments with defaults",
        lambda: call(y="leave"),
        "InputError: Called: missing a required argument: 'y'; expected Called(x, ids, pair, "
        "n=2, y=..., *, mask=None, config=...)",
        "Its default is nothing that a program can keep: pass it.",
    ),
    Case(
        "call_not_compiled",
        "An argument that was left out when the module was compiled",
        lambda: call(config=1),
        "InputError: Called: config was given, but not when the module was compiled: leave it "
        "out, or compile with it",
        "Compile with it, or leave it out.",
    ),
    Case(
        "call_optional",
        "An optional tensor that was left out when the module was compiled",
        lambda: call(mask=X),
        "InputError: Called, mask: found a tensor, expected None (constants are compiled in)",
        "Compile with it, or leave it out.",
    ),
    Case(
        "call_constant",
        "Another flag, number or text than was compiled",
        lambda: call(n=3),
        "InputError: Called, n: found 3, expected 2 (constants are compiled in)",
        "Compile with this one; a nested module may be called with several.",
    ),
    Case(
        "call_no_tensor",
        "No tensor",
        lambda: call(x=[1.0]),
        "InputError: Called, x: found a list of 1, expected a tensor",
        "Pass a NumPy array, a torch tensor or a JAX array.",
    ),
    Case(
        "call_container",
        "A list, tuple or dict of another form",
        lambda: call(pair={"a": X}),
        "InputError: Called, pair: found a dict with keys a, expected a dict with keys a, b",
        "Pass it as it was when the module was compiled.",
    ),
    Case(
        "call_dtype",
        "A tensor of another dtype",
        lambda: call(x=X.double()),
        "InputError: Called, x: found dtype float64, expected float32",
        "Convert it: nothing is cast silently.",
    ),
    Case(
        "call_device",
        "A tensor on another device",
        lambda: call(x=X.to("meta")),
        "InputError: Called, x: found a tensor on meta, expected one on the CPU; call .cpu()",
        "Call `.cpu()`.",
    ),
    Case(
        "call_layout",
        "A sparse or nested tensor",
        lambda: call(x=X.to_sparse()),
        "InputError: Called, x: found a torch.sparse_coo tensor, expected a dense one",
        "Call `.to_dense()`.",
    ),
    Case(
        "call_rank",
        "More or fewer axes",
        lambda: call(x=X[0]),
        "InputError: Called, x: found shape [4], expected [T, 4] with T in 1..64",
        "Add or drop an axis.",
    ),
    Case(
        "call_shape",
        "Another fixed size",
        lambda: call(x=rows(3, 5)),
        "InputError: Called, x: found shape [3, 5], expected [T, 4] with T in 1..64",
        "Only axes with a name may vary.",
    ),
    Case(
        "call_equal",
        "Axes that must be equal are not",
        lambda: call(ids=torch.tensor([1, 2])),
        "InputError: Called, ids: found shape [2], expected [T] with T in 1..64, where T = 3 "
        "from what came before",
        "Sizes of one name are equal in all arguments.",
    ),
    Case(
        "call_range",
        "A size outside its range",
        lambda: call(x=rows(65, 4)),
        "InputError: Called, x: found shape [65, 4], expected [T, 4] with T in 1..64: T is 65",
        "Compile with a larger `max`.",
    ),
    Case(
        "run",
        "A method fails, here an index beyond the embedding",
        lambda: call(ids=torch.tensor([1, 2, 10])),
        "RunError: method 'glue_0' failed in aten.embedding: Check failed (indices_ptr[i] < "
        "weight_height): indices_ptr[2] 10 >= weight.size(0) 10",
        "The text after the name is ExecuTorch's; mostly a value is out of range.",
    ),
]

OUT = [
    Case(
        "out_count",
        "More or fewer tensors than results",
        lambda: call(out=[torch.empty(3, 4)]),
        "InputError: Called, out: found 1 tensors, expected 2",
        "One for each tensor of the result, in order.",
    ),
    Case(
        "out_kind",
        "Memory that cannot be written",
        lambda: call(out=results(second=[0.0])),
        "InputError: Called, out: found a list, expected contiguous, writable float32 with room "
        "for [3, 4]: a NumPy array or a torch tensor",
        "Give a NumPy array or a torch tensor.",
    ),
    Case(
        "out_fit",
        "Another dtype, too little room, read-only or not contiguous",
        lambda: call(out=results(second=torch.empty(2, 4))),
        "InputError: Called, out: found float32[2, 4], expected contiguous, writable float32 "
        "with room for [3, 4]",
        "Give memory for the largest result that you expect.",
    ),
    Case(
        "out_shared",
        "The memory is that of an argument, or of another result",
        lambda: call(out=results(first=X)),
        "InputError: out: the memory for result 0 is also that of x; give it memory of its own",
        "Give each result memory of its own.",
    ),
]

STATES = [
    Case(
        "state_unknown",
        "A name that no state has",
        lambda: program().state["count"],
        "InputError: state 'count': there is no such state; this program has total",
        "`list(program.state)` has all names.",
    ),
    Case(
        "state_shape",
        "A value of another dtype or shape",
        lambda: set_state("total", np.zeros(3)),
        "InputError: state 'total': found float64[3], expected float32[4]",
        "Convert it: nothing is cast silently.",
    ),
    Case(
        "state_delete",
        "A state is deleted",
        delete_state,
        "InputError: state 'total': cannot be deleted; reset() gives it its first value",
        "A state belongs to its program.",
    ),
    Case(
        "threads",
        "More threads than cores, or none",
        set_threads,
        "InputError: threads: found 0, expected 1 to 8 (the cores of this machine)",
        "Give a number in the range.",
    ),
]
