"""torch.export of a flat module to a functional graph, and in one sentence why it could not be done."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind

from doubleweave.compiler.quiet import quiet
from doubleweave.compiler.trace import dims as _dims
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.flat_module import Flat
from doubleweave.compiler.trace.user_site import user_site
from doubleweave.errors import DoubleweaveError, SplitError
from doubleweave.ir.interface import Parameter

_SYMBOL = re.compile(r"\b[su]\d+\b")


def export_flat(what: str, flat: Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
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


def _functional(flat: Flat, examples: tuple[Tensor, ...], shapes: Any) -> torch.export.ExportedProgram:
    exported = torch.export.export(flat, examples, dynamic_shapes=shapes, strict=False)
    _merge_sharedbuffers_of(exported)
    functional: torch.export.ExportedProgram = exported.run_decompositions({})
    return functional


def _merge_sharedbuffers_of(exported: torch.export.ExportedProgram) -> None:
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


def _reason(flat: Flat, leaves: Sequence[Leaf], error: Exception) -> str:
    """What torch.export did not like, in one sentence, with dims that would work where dims are the matter."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if "DataDependent" in type(error).__name__:
        return (
            f"an if, a loop or an index at {user_site(error)}, depends on the values of a tensor, which a program "
            "cannot follow; use torch.where, or take it outside the module"
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


def working_dims(flat: Flat, leaves: Sequence[Leaf]) -> str | None:
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
    leaves = [Leaf(path, tensor, {}) for path, tensor in zip(tensor_paths(parameters), tensors, strict=True)]
    return working_dims(Flat(module, parameters), leaves)


def tensor_paths(parameters: Sequence[Parameter]) -> list[str]:
    return [path for p in parameters if p.tree is not None for path in p.tree.paths(p.name)]
