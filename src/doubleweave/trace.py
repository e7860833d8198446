"""Trace a module to one functional graph in which each module that the policy names is one node.

`torch.export` runs the module once; a named nested module is marked where it is called (what goes in, what comes
out), and what it computes is cut out again. The nested modules are traced on their own, with their own dims.
Buffers that `forward` changes become inputs and outputs of the graph. It knows nothing of segments or backends.
"""

from __future__ import annotations

import contextlib
import io
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from doubleweave import dims as _dims
from doubleweave.attributes import attributes_restored, changed, check_kept, kept, snapshot
from doubleweave.cut_out import cut_out_calls
from doubleweave.dims import Leaf
from doubleweave.errors import DoubleweaveError, PolicyError, SplitError
from doubleweave.interface import Interface, Parameter, parameters_of
from doubleweave.ir import ITEM_BYTES
from doubleweave.policy import Match
from doubleweave.quiet import quiet
from doubleweave.traced import BOUNDARY, Call, Trace
from doubleweave.trees import ALLOWED, Tree, TreeError, build, flatten

_OURS = str(Path(__file__).parent)
_TORCHS = str(Path(torch.__file__).parent)
_SYMBOLIC = ("a SymInt", "a SymFloat", "a SymBool")
_SYMBOL = re.compile(r"\b[su]\d+\b")


class _Flat(nn.Module):
    """A module as a function of its input tensors alone, which returns a tuple of tensors."""

    def __init__(
        self,
        module: nn.Module,
        parameters: tuple[Parameter, ...],
        note: Callable[[Tree, list[str]], None] = lambda returns, is_set: None,
    ) -> None:
        super().__init__()
        self.model = module
        self.parameters_ = parameters
        self.note = note  # gets the result's tree and the attributes that forward set: torch takes them back
        self.separates_changes = False
        self.train(module.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = _arguments(self.parameters_, iter(tensors))
        before, had, attributes = _buffers(self.model), kept(self.model), snapshot(self.model)
        versions = [buffer._version for _, _, buffer in before]
        result = self.model(*args, **kwargs)
        check_kept(self.model, had)
        try:
            returns, found = flatten(result, "its result")
        except TreeError as error:
            raise _refused_result(type(self.model).__name__, error) from None
        self.note(returns, sorted({name for _, name in changed(attributes)}))
        found = _change_assigned(before, found)
        updated = [buffer for (_, _, buffer), n in zip(before, versions, strict=True) if buffer._version != n]
        for buffer in updated[1:] if self.separates_changes else ():
            buffer.copy_(buffer.clone())
        return tuple(found)


def _refused_result(what: str, error: TreeError) -> SplitError:
    if error.found in _SYMBOLIC:
        return SplitError(
            f"{what}: {error.where} is a size that varies from call to call; leave it out, its caller has the shapes"
        )
    return SplitError(f"{what}: {error}")


def _arguments(
    parameters: Sequence[Parameter], tensors: Iterator[Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    skipped = False
    for p in parameters:
        if p.tree is None or (p.default is not None and p.tree == p.default):
            skipped = True  # left out: the module's own default
            continue
        value = build(p.tree, tensors)
        if p.kind == "VAR_KEYWORD":
            kwargs.update(value)
        elif p.kind == "VAR_POSITIONAL":
            args += value
        elif p.kind == "KEYWORD_ONLY" or (skipped and p.kind != "POSITIONAL_ONLY"):
            kwargs[p.name] = value
        else:
            args.append(value)
    return args, kwargs


def bind(what: str, module: nn.Module | _Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """(parameters, tensors) of a call of `module`; raises PolicyError where the arguments do not fit."""
    try:
        parameters, tensors = parameters_of(module.forward, args, kwargs)
    except TypeError as error:
        raise PolicyError(f"{what}: {error}") from None
    except TreeError as error:
        if error.found in _SYMBOLIC:
            raise SplitError(
                f"{what}: argument {error.where} is a size that varies from call to call; take it from a tensor's "
                "shape inside the module, or pass a tensor"
            ) from None
        raise SplitError(f"{what}: argument {error.where} is {error.found}, expected {ALLOWED}") from None
    for path, tensor in zip(_paths(parameters), tensors, strict=True):
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

    Raises SplitError where torch.export cannot, or for what a program cannot hold.
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
    flat = _Flat(module, parameters, lambda *found: noted.append(found))
    calls: list[Call] = []
    with (
        _cut([match for match in named if match.module is not module], calls),
        attributes_restored(module),
    ):
        exported = _export(what, flat, leaves)
    returns, is_set = noted[-1]
    if is_set:
        _check_forgets(what, module, is_set, flat, leaves)
    if not returns.num_tensors:
        raise SplitError(f"{what}: returns no tensor; expected at least one")
    return cut_out_calls(what, module, exported, Interface(parameters, returns), leaves, calls)


def _check_forgets(
    what: str, module: nn.Module, is_set: list[str], flat: _Flat, leaves: Sequence[Leaf]
) -> None:
    """Refuse a module whose second call reads what its first one left in an attribute."""
    buffers = [(buffer, buffer.clone()) for _, _, buffer in _buffers(module)]
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
    """Integers stay what they are: they may be indices."""
    return torch.rand_like(leaf.example) if leaf.example.is_floating_point() else leaf.example


@contextlib.contextmanager
def _cut(matches: Sequence[Match], calls: list[Call]) -> Iterator[None]:
    """While this lasts, calls of these modules are marked in what is traced and noted in `calls`."""
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
    def call(*args: Any, **kwargs: Any) -> Any:
        site = _site()
        what = f"{match.name!r}, called at {site}"
        parameters, tensors = bind(what, _Forward(forward), args, kwargs)
        before = _buffers(match.module)
        result = forward(*args, **kwargs)
        try:
            returns, outputs = flatten(result, "its result")
        except TreeError as error:
            raise _refused_result(what, error) from None
        if not outputs:
            raise SplitError(f"{what}: returns no tensor; name the module around it in the policy instead")
        outputs = _change_assigned(before, outputs)
        number = len(calls)
        calls.append(Call(match, parameters, returns, site))
        return build(returns, iter(BOUNDARY(tensors, outputs, number)))

    return call


_Buffers = list[tuple[nn.Module, str, Tensor]]


def _buffers(module: nn.Module) -> _Buffers:
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


def _change_assigned(before: _Buffers, results: list[Tensor]) -> list[Tensor]:
    """Turn `self.total = self.total + x` into a change of the buffer: torch.export forgets the assignment.

    Returns the results, a copy of each that is the buffer as it was.
    """
    for owner, name, buffer in before:
        found = owner._buffers.get(name)
        if found is buffer:
            continue
        if found is None or found.shape != buffer.shape or found.dtype != buffer.dtype:
            now = "None" if found is None else f"{found.dtype}{list(found.shape)}"
            raise SplitError(
                f"buffer {name!r} of {type(owner).__name__}: {buffer.dtype}{list(buffer.shape)} becomes {now} in "
                "forward; expected a state of one size and dtype"
            )
        results = [result.clone() if result is buffer else result for result in results]
        buffer.copy_(found)
        owner._buffers[name] = buffer
    return results


@dataclass
class _Forward:
    forward: Any


def _site(error: BaseException | None = None) -> str:
    """Where the user's code is, now or where it met this error: "model.py:12, in forward"."""
    stack = traceback.extract_stack() if error is None else traceback.extract_tb(error.__traceback__)
    for frame in reversed(stack):
        if not frame.filename.startswith((_OURS, _TORCHS, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
    return "an unknown place"


def _export(what: str, flat: _Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    examples = tuple(leaf.example for leaf in leaves)
    axes = [leaf.axes for leaf in leaves]
    try:
        # torch prints the graph so far where it gives up.
        with torch.no_grad(), quiet(), contextlib.redirect_stderr(io.StringIO()):
            shapes = (tuple(axes),) if axes else None
            try:
                return _functional(flat, examples, shapes)
            except torch._export.verifier.SpecViolationError:
                # It cannot tell changes apart that give two buffers one value.
                flat.separates_changes = True
                return _functional(flat, examples, shapes)
    except DoubleweaveError:
        raise
    except Exception as error:
        # A named module deeper down may have raised one of ours.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, DoubleweaveError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise SplitError(f"{what}: {_reason(flat, leaves, error)}") from error


def _functional(flat: _Flat, examples: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    exported = torch.export.export(flat, examples, dynamic_shapes=shapes, strict=False)
    _merge_shared_buffers(exported)
    functional: torch.export.ExportedProgram = exported.run_decompositions({})
    return functional


def _merge_shared_buffers(exported: torch.export.ExportedProgram) -> None:
    """Let a buffer that the module has under several names be one input: torch cannot change it otherwise."""
    signature = exported.graph_signature
    tensors = {**exported.constants, **exported.state_dict}
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    first: dict[int, torch.fx.Node] = {}
    for spec in list(signature.input_specs):
        buffer = tensors.get(spec.target or "") if spec.kind is InputKind.BUFFER else None
        if buffer is None:
            continue
        node = nodes[spec.arg.name]
        kept = first.setdefault(id(buffer), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            exported.graph.erase_node(node)
            signature.input_specs.remove(spec)
    exported.graph_module.recompile()


def _reason(flat: _Flat, leaves: Sequence[Leaf], error: Exception) -> str:
    """What torch.export did not like, in one sentence, with dims that would work where dims are the matter."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if "DataDependent" in type(error).__name__:
        return (
            f"an if, a loop or an index at {_site(error)}, depends on the values of a tensor, which a program cannot "
            "follow; use torch.where, or take it outside the module"
        )
    first = lines[0].rstrip(".:") if lines else type(error).__name__
    if first.startswith("Constraints violated"):
        begin = lines.index("Suggested fixes:") + 1 if "Suggested fixes:" in lines else len(lines)
        fixes = takewhile(lambda line: " = " in line, lines[begin:])
        first = "torch.export asks for " + ", ".join(fixes) if begin < len(lines) else ""
    why = "" if not first or _SYMBOL.search(first) else f" ({first})"  # torch's names of sizes say nothing
    if any(isinstance(dim, Dim) for leaf in leaves for dim in leaf.axes.values()):
        works = working_dims(flat, leaves)
        if works is not None:
            return f"its dims do not fit what it computes{why}; dims that would work: {works}"
    return f"torch.export cannot trace it: {type(error).__name__}{why}"


def working_dims(flat: _Flat, leaves: Sequence[Leaf]) -> str | None:
    """Dims of every axis that can be dynamic, equal ones under one name; None if it cannot be exported at all."""
    free = []
    for leaf in leaves:
        example = torch.zeros(leaf.given or leaf.example.shape, dtype=leaf.example.dtype)
        free.append(Leaf(leaf.path, example, dict.fromkeys(range(example.ndim), Dim.AUTO)))
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(
                flat,
                tuple(leaf.example for leaf in free),
                dynamic_shapes=(tuple(leaf.axes for leaf in free),),
                strict=False,
            )
    except Exception:
        return None
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(free) :]
    names: dict[str, str] = {}
    letters = iter("mknpqrstuvwxyz")
    axes: list[dict[int, str]] = []
    for node in inputs:
        named = {}
        for axis, size in enumerate(node.meta["val"].shape):
            # The expression knows of sizes that turned out fixed, or equal to another.
            if not isinstance(size, int) and not size.node.expr.is_Integer:
                key = str(size.node.expr)
                if key not in names:
                    names[key] = next(letters, f"d{len(names)}")
                named[axis] = names[key]
        axes.append(named)
    return _dims.text([leaf.path for leaf in leaves], axes) if names else None


def suggest(module: nn.Module, parameters: tuple[Parameter, ...], tensors: Sequence[Tensor]) -> str | None:
    """`working_dims` for arguments of these sizes."""
    leaves = [Leaf(path, tensor, {}) for path, tensor in zip(_paths(parameters), tensors, strict=True)]
    return working_dims(_Flat(module, parameters), leaves)


def _paths(parameters: Sequence[Parameter]) -> list[str]:
    return [path for p in parameters if p.tree is not None for path in p.tree.paths(p.name)]
