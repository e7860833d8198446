"""torch.export of a flat module to a functional graph, or one sentence on why the export failed."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.export.graph_signature import InputKind

from doubleweave.compiler.graph.export import export
from doubleweave.compiler.graph.nodes import expression, is_tensor, output_node
from doubleweave.compiler.quiet import quiet
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.compiler.trace.flat_module import Flat
from doubleweave.compiler.trace.user_site import user_site
from doubleweave.compiler.trace.working_dims import fixed_sizes, suggestions, with_given_sizes, working_plan
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
    exported = export(flat, [leaf.example for leaf in leaves], shapes)
    _refuse_empty_results(exported, leaves)
    return exported


def _export_any(flat: Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    """Export over examples of own sizes, all different, or, where those are too small for it, of the user's."""
    try:
        return _export(flat, leaves)
    except Exception:
        if (given := with_given_sizes(leaves)) is None:
            raise
        try:
            return _export(flat, given)
        except Exception:
            pass
        raise


def _refuse_empty_results(exported: torch.export.ExportedProgram, leaves: Sequence[Leaf]) -> None:
    """Raise ValueError, worded as torch.export's own, where a result has no elements at the least of a dim."""
    names: dict[Any, tuple[str, int, int]] = {}
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for node, leaf in zip(inputs[len(inputs) - len(leaves) :], leaves, strict=True):
        for axis, dim in leaf.axes.items():
            size, root = expression(node.meta["val"].shape[axis]), getattr(dim, "root", dim)
            if isinstance(root, Dim) and len(size.free_symbols) == 1:
                names[next(iter(size.free_symbols))] = root.__name__, root.min, root.max
    (results,) = output_node(exported.graph).args
    for size in (expression(s) for result in results if is_tensor(result) for s in result.meta["val"].shape):
        if len(size.free_symbols) != 1 or (symbol := next(iter(size.free_symbols))) not in names:
            continue
        name, low, high = names[symbol]
        least = next((n for n in range(low, high + 1) if size.subs(symbol, n) >= 1), high)
        if least > low:
            raise ValueError(f"a result is empty\nSuggested fixes:\n  {name} = Dim('{name}', min={least})")


def _functional(flat: Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    exported = _export_any(flat, leaves)
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
