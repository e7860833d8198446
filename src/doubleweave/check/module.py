"""The check of any other module: its program gives what the module gives.

It runs on the example and at the ends of the dims.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from doubleweave.compiler.program_folder import Progress
from doubleweave.errors import CheckError
from doubleweave.ir.check import Check
from doubleweave.ir.sizes import evaluate, shape_of
from doubleweave.runtime.module.program import ModuleProgram

Call = tuple[Sequence[Any], Mapping[str, Any]]

# Of the largest number, and of each number: float32 kernels that add up in another order are off by less.
_OF_LARGEST, _OF_EACH = 2e-5, 1e-4
# The end of a dim is left out where it would be dear: arguments of more elements, or of so many times the example's.
_MOST_ELEMENTS, _MOST_TIMES = 1 << 22, 64


def check_module(module: nn.Module, given: Call, program: ModuleProgram, report: Progress) -> Check:
    """Run module and program on the example and with all dims at their ends; raises CheckError where they differ.

    What a module gives by chance, other numbers at each call, is not compared.
    """
    report("checking", 0, 1)
    worst = 0.0
    for call in (given, *_at_ends(program, given)):
        try:
            wanted, again = _leaves(_run(module, call)), _leaves(_run(module, call))
        except Exception:
            if call is given:
                raise
            continue  # the module itself does not take these sizes
        found = _leaves(program.session()(*call[0], **call[1]))
        for number, (a, b, c) in enumerate(zip(found, wanted, again, strict=True)):
            off = _off(a, b)
            if not off <= 1 and _off(c, b) <= 1:
                sizes = ", ".join(str(list(leaf.shape)) for leaf in _leaves(call))
                raise CheckError(
                    f"{program.name}: result {number} of the program is other than the module's for arguments of sizes "
                    f"{sizes}: {_apart(a, b)}; nothing was written. Please report the module, or compile it with "
                    "check=False"
                )
            worst = max(worst, off if math.isfinite(off) else 0.0)
    return Check("program", source_off=worst)


def _run(module: nn.Module, call: Call) -> Any:
    """What the module gives; neither its state nor the arguments change."""
    weights = {id(parameter): parameter for parameter in module.parameters()}
    own = copy.deepcopy(module, weights)  # weights are shared
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, call)
    with torch.no_grad():
        return own(*args, **kwargs)


def _leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a part of what rounding may give; 0 for equal numbers."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else math.inf
    a, b = found.double(), wanted.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    finite = b[b.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    coarser = torch.finfo(wanted.dtype).eps / torch.finfo(torch.float32).eps
    allowed = coarser * (_OF_LARGEST * largest + _OF_EACH * b.abs()) + torch.finfo(wanted.dtype).tiny
    return float(
        torch.where(same, 0.0, (a - b).abs() / allowed).nan_to_num(nan=math.inf, posinf=math.inf).max()
    )


def _apart(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"found {found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
    off = (found.double() - wanted.double()).abs()
    at = int(off.nan_to_num(nan=math.inf).argmax())
    return f"found {found.reshape(-1)[at].item():.7g}, expected {wanted.reshape(-1)[at].item():.7g}"


def _at_ends(program: ModuleProgram, given: Call) -> list[Call]:
    """The example with all dims at the least, and with all at the most, that the program takes."""
    main = program.split.main
    tensors = program.main.interface.bind(program.name, *given)
    least: dict[str, int] = {}
    for symbol, low, _ in main.ranges:
        least[symbol] = evaluate(low, least)
    most = {symbol: high for symbol, _, high in main.ranges}
    calls = []
    elements = sum(tensor.numel() for tensor in tensors)
    for values in (least, most) if main.ranges else ():
        shapes = [shape_of(value.shape, values) for value in main.inputs]
        if sum(map(math.prod, shapes)) > min(_MOST_ELEMENTS, _MOST_TIMES * elements):
            continue
        other = {id(tensor): _resized(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)}
        calls.append(tree_map(lambda leaf, other=other: other.get(id(leaf), leaf), given))
    return calls


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor's own numbers, over and over: whatever they mean stays valid."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            rows = torch.arange(size) % max(1, tensor.shape[axis])
            tensor = tensor.index_select(axis, rows)
    return tensor
