"""Trace a module to one functional graph in which each module that the policy names is one node.

`torch.export` runs the module once; a named nested module is marked where it is called (what goes in, what comes
out), and what it computes is cut out again. The nested modules are traced on their own, with their own dims.
Buffers that `forward` changes become inputs and outputs of the graph. It knows nothing of segments or backends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from doubleweave.compiler.policy import Match
from doubleweave.compiler.trace.attributes import attributes_restored
from doubleweave.compiler.trace.cut_out import cut_out_calls
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.export_flat import export_flat, tensor_paths
from doubleweave.compiler.trace.flat_module import SYMBOLIC, Flat, buffers_of, change_assigned, flatten_result
from doubleweave.compiler.trace.trace_data import BOUNDARY, Call, Trace
from doubleweave.compiler.trace.user_site import user_site
from doubleweave.errors import PolicyError, SplitError
from doubleweave.ir.interface import Interface, Parameter, parameters_of
from doubleweave.ir.split import ITEM_BYTES
from doubleweave.ir.trees import ALLOWED, Tree, TreeError, build


def bind(what: str, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """(parameters, tensors) of a call of a module's `forward`.

    Raises PolicyError for arguments that do not fit it, SplitError for an argument that a program cannot take.
    """
    try:
        parameters, tensors = parameters_of(forward, args, kwargs)
    except TypeError as error:
        raise PolicyError(f"{what}: {error}") from None
    except TreeError as error:
        if error.found in SYMBOLIC:
            raise SplitError(
                f"{what}: argument {error.where} is a size that varies from call to call; take it from a tensor's "
                "shape inside the module, or pass a tensor"
            ) from None
        raise SplitError(f"{what}: argument {error.where} is {error.found}, expected {ALLOWED}") from None
    for path, tensor in zip(tensor_paths(parameters), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            raise PolicyError(
                f"{what}: argument {path} is a {type(tensor).__name__}, expected a torch.Tensor: a module runs in "
                "torch when it is compiled; use torch.as_tensor"
            )
    return parameters, tensors


def trace(
    what: str,
    module: nn.Module,
    parameters: tuple[Parameter, ...],
    leaves: tuple[Leaf, ...],
    named: Sequence[Match],
) -> Trace:
    """Trace `module` over its arguments' leaves; `named` are the modules that the policy names.

    Raises SplitError where torch.export fails and where the module does something that a program cannot.
    """
    for leaf in leaves:
        dtype = str(leaf.example.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES or leaf.example.device.type != "cpu":
            raise SplitError(
                f"{what}: {leaf.path} is {dtype} on {leaf.example.device}, expected a tensor on the CPU of "
                f"{', '.join(ITEM_BYTES)}"
            )
        if 0 in leaf.example.shape:
            raise SplitError(
                f"{what}: {leaf.path} is empty, {list(leaf.example.shape)}, expected at least one element"
            )
    noted: list[tuple[Tree, list[str]]] = []
    flat = Flat(module, parameters, lambda *found: noted.append(found))
    calls: list[Call] = []
    with _cut([match for match in named if match.module is not module], calls), attributes_restored(module):
        exported = export_flat(what, flat, leaves)
    # torch.export may be tried twice; the last run of forward is the exported one.
    returns, is_set = noted[-1]
    if is_set:
        _check_forgets(what, module, is_set, flat, leaves)
    if not returns.num_tensors:
        raise SplitError(f"{what}: returns no tensor; expected at least one")
    return cut_out_calls(what, module, exported, Interface(parameters, returns), leaves, calls)


def _check_forgets(
    what: str, module: nn.Module, is_set: list[str], flat: Flat, leaves: Sequence[Leaf]
) -> None:
    """Refuse a module whose second call reads an attribute that its first call set."""
    # Compared in numbers: an attribute that is set and never read across calls, such as a cached result, is harmless.
    buffers = [(buffer, buffer.clone()) for _, _, buffer in buffers_of(module)]
    before, given = ([_some_numbers(leaf) for leaf in leaves] for _ in range(2))
    results = []
    for calls in ([given], [before, given]):
        with attributes_restored(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for args in calls:
                torch.manual_seed(0)
                result = flat(*args)
                for buffer, old in buffers:
                    buffer.copy_(old)
        results.append(result)
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise SplitError(
            f"{what}: a second call gives other results, by what forward left in {', '.join(map(repr, is_set))}, which "
            "a program does not remember; make it a buffer with register_buffer"
        )


def _some_numbers(leaf: Leaf) -> Tensor:
    # Integers may be indices, for which random numbers could be out of range.
    return torch.rand_like(leaf.example) if leaf.example.is_floating_point() else leaf.example


@contextlib.contextmanager
def _cut(matches: Sequence[Match], calls: list[Call]) -> Iterator[None]:
    """Within this context, calls of these modules are marked in the traced graph and noted in `calls`."""
    before = [(match.module, match.module.__dict__.get("forward")) for match in matches]
    try:
        for match in matches:
            match.module.forward = _marked(match, match.module.forward, calls)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _marked(match: Match, forward: Any, calls: list[Call]) -> Any:
    """A `forward` that also notes its call in `calls` and passes its tensors through a boundary node."""

    def call(*args: Any, **kwargs: Any) -> Any:
        site = user_site()
        what = f"{match.name!r}, called at {site}"
        parameters, tensors = bind(what, forward, args, kwargs)
        before = buffers_of(match.module)
        result = forward(*args, **kwargs)
        returns, outputs = flatten_result(what, result)
        if not outputs:
            raise SplitError(f"{what}: returns no tensor; name the module around it in the policy instead")
        outputs = change_assigned(before, outputs)
        number = len(calls)
        calls.append(Call(match, parameters, returns, site))
        # The caller goes on with the boundary's copies, so the operators behind them can be cut out.
        return build(returns, iter(BOUNDARY(tensors, outputs, number)))

    return call
