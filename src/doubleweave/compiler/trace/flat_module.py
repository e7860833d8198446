"""A module as a function of its input tensors alone, the form that torch.export traces.

Changes of buffers show in the graph; state in plain attributes is refused (attributes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from doubleweave.compiler.trace.attributes import changed, check_kept, kept, snapshot
from doubleweave.errors import SplitError
from doubleweave.ir.interface import Parameter
from doubleweave.ir.trees import Tree, TreeError, build, flatten

SYMBOLIC = ("a SymInt", "a SymFloat", "a SymBool")


class Flat(nn.Module):
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
        # Receives the result's tree and the attributes that forward set, which torch.export undoes when it returns.
        self.note = note
        self.separates_changes = False
        self.train(module.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = arguments(self.parameters_, iter(tensors))
        before, had, attributes = buffers_of(self.model), kept(self.model), snapshot(self.model)
        versions = [buffer._version for _, _, buffer in before]
        result = self.model(*args, **kwargs)
        check_kept(self.model, had)
        returns, found = flatten_result(type(self.model).__name__, result)
        self.note(returns, sorted({name for _, name, _ in changed(attributes)}))
        found = change_assigned(before, found)
        updated = [buffer for (_, _, buffer), n in zip(before, versions, strict=True) if buffer._version != n]
        # A copy of its own makes each buffer's new value a node of its own.
        for buffer in updated[1:] if self.separates_changes else ():
            buffer.copy_(buffer.clone())
        return tuple(found)


def flatten_result(what: str, result: Any) -> tuple[Tree, list[Tensor]]:
    """The tree of a module's result and its tensors; raises SplitError for a type that no tree holds."""
    try:
        return flatten(result, "its result")
    except TreeError as error:
        reason = str(error)
        if error.found in SYMBOLIC:
            reason = f"{error.where} is a size that varies from call to call; leave it out, its caller has the shapes"
        raise SplitError(f"{what}: {reason}") from None


def arguments(parameters: Sequence[Parameter], tensors: Iterator[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call of a module over these input tensors."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    skipped = False
    for p in parameters:
        if p.tree is None or (p.default is not None and p.tree == p.default):
            # The module's own default; parameters behind it go by name.
            skipped = True
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


Buffers = list[tuple[nn.Module, str, Tensor]]


def buffers_of(module: nn.Module) -> Buffers:
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


def change_assigned(before: Buffers, results: list[Tensor]) -> list[Tensor]:
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
