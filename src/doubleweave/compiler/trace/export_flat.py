"""torch.export of a flat module to a functional graph, or one sentence on why the export failed."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

import torch
from torch.export import Dim
from torch.export.graph_signature import InputKind

from doubleweave.compiler.graph.export import export
from doubleweave.compiler.quiet import quiet
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.flat_module import Flat
from doubleweave.compiler.trace.user_site import user_site
from doubleweave.compiler.trace.working_dims import fixed_sizes, suggestions, working_plan
from doubleweave.errors import DoubleweaveError, SplitError
from doubleweave.ir.interface import Parameter

_SYMBOL = re.compile(r"\b[su]\d+\b")


def export_flat(what: str, flat: Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    """Raises SplitError with the reason where torch.export fails."""
    try:
        # torch prints the graph so far where it gives up.
        with torch.no_grad(), quiet(), contextlib.redirect_stderr(io.StringIO()):
            try:
                return _functional(flat, leaves)
            except torch._export.verifier.SpecViolationError:
                # torch's verifier refuses two buffers whose new values are one node.
                flat.separates_changes = True
                return _functional(flat, leaves)
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


def _export(flat: Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    shapes = (tuple(leaf.axes for leaf in leaves),) if leaves else None
    return export(flat, [leaf.example for leaf in leaves], shapes)


def _functional(flat: Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    exported = _export(flat, leaves)
    _merge_shared_buffers(exported)
    # An empty table decomposes nothing: it only turns changes in place into values.
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


def _reason(flat: Flat, leaves: Sequence[Leaf], error: Exception) -> str:
    """Why torch.export failed, in one sentence, with dims that would work if the dims were the reason."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if "DataDependent" in type(error).__name__:
        return (
            f"an if, a loop or an index at {user_site(error)}, depends on the values of a tensor, which a program "
            "cannot follow; use torch.where, or take it outside the module"
        )
    if any(isinstance(dim, Dim) for leaf in leaves for dim in leaf.axes.values()):
        if works := working_dims(flat, leaves):
            return f"its dims do not fit what it computes; {works}"
        if asked := suggestions(str(error)):
            return f"its dims do not fit what it computes; torch.export asks for {', '.join(asked)}"
    first = lines[0].rstrip(".:") if lines else ""
    why = "" if not first or _SYMBOL.search(first) else f" ({first})"  # torch's names of sizes say nothing
    return f"torch.export cannot trace it: {type(error).__name__}{why}"


def working_dims(flat: Flat, leaves: Sequence[Leaf], *, has_clash: bool = False) -> str:
    """Dims that would work, in a few words; "" where none are found.

    `has_clash`: one Dim stands for axes of several sizes.
    """

    def attempt(tried: Sequence[Leaf]) -> torch.export.ExportedProgram:
        with torch.no_grad(), quiet(), contextlib.redirect_stderr(io.StringIO()):
            return _export(flat, tried)

    plan = working_plan(leaves, attempt, has_clash=has_clash)
    if plan is not None:
        return f"dims that would work: {plan.text(leaves)}"
    return f"it would work with fixed sizes{fixed}" if (fixed := fixed_sizes(leaves, attempt)) else ""


def tensor_paths(parameters: Sequence[Parameter]) -> list[str]:
    return [path for p in parameters if p.tree is not None for path in p.tree.paths(p.name)]
