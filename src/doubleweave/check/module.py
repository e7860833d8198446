"""The check of any other module: its program gives what the module gives, on the example and at the ends of the dims.

The module runs in eager torch and is left as it was: its buffers, its attributes, the states of random generators.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doubleweave.check.rounding import Rounding, excess, spread
from doubleweave.compiler.program_folder import Progress
from doubleweave.compiler.trace.attributes import attributes_restored
from doubleweave.compiler.trace.flat_module import arguments, buffers_of
from doubleweave.errors import CheckError, RunError
from doubleweave.ir.check import Check
from doubleweave.ir.sizes import evaluate, shape_of
from doubleweave.ir.trees import TreeError, build, flatten
from doubleweave.runtime.module.method import Method

Call = tuple[Sequence[Any], Mapping[str, Any]]

# The end of a dim is left out where its tensors have more elements than this, or than so many times the example's.
_MOST_ELEMENTS, _MOST_TIMES = 1 << 22, 64
_LEAST_BUDGET_S = 10.0


def check_module(
    module: nn.Module,
    given: Call,
    fresh: Callable[[], Method],
    report: Progress,
    budget_s: float = math.inf,
) -> Check:
    """Run module and program on the example and with all dims at their ends; raises CheckError where they differ.

    `fresh` gives the whole program as a method, with states as they are at first. An end that would take longer than
    what is left of the budget is left out. Not compared are results that are other ones at each call, and numbers that
    rounding alone could make as different.
    """
    report("checking", 0, 1)
    budget_s = max(_LEAST_BUDGET_S, budget_s)
    began = time.perf_counter()
    main = fresh()
    worst = _compare(module, given, main)
    took_s = time.perf_counter() - began
    for call, times in _ends(main, given):
        if time.perf_counter() - began + took_s * times > budget_s:
            continue
        try:
            run(module, call)
        except Exception:
            continue  # the module itself does not take these sizes
        worst = max(worst, _compare(module, call, fresh()))
    return Check("program", source_off=worst)


def run(module: nn.Module, call: Call) -> list[Tensor]:
    """The tensors that the module gives for copies of the arguments; nothing of it changes, nor a random generator."""
    args, kwargs = ([_copied(value) for value in call[0]], {k: _copied(v) for k, v in call[1].items()})
    buffers = [(*found, found[2]._version) for found in buffers_of(module)]
    old = [buffer.clone() for _, _, buffer, _ in buffers]
    with torch.no_grad(), _generators_kept(), attributes_restored(module):
        try:
            results = flatten(module(*args, **kwargs), "the result")[1]
            return [result.detach().clone() for result in results]  # they may be buffers
        finally:
            for (owner, name, buffer, version), value in zip(buffers, old, strict=True):
                owner._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


def _copied(value: Any) -> Any:
    """A value with copies of its tensors; itself where no tree holds it."""
    try:
        tree, leaves = flatten(value, "")
    except TreeError:
        return value
    return build(tree, iter([leaf.clone() for leaf in leaves])) if leaves else value


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    # NumPy's global generator is what modules use.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _compare(module: nn.Module, call: Call, program: Method) -> float:
    """The largest difference, as a part of what is allowed; raises CheckError for one that is larger."""
    wanted = run(module, call)
    try:
        with torch.no_grad():
            found = flatten(program(*call[0], **call[1]), "the result")[1]
    except RunError as error:
        raise CheckError(
            f"{program.name}: the program fails for arguments of sizes {_sizes(call)}, which the module takes: "
            f"{error}; nothing was written. Keep the operator outside of the module, or compile it with check=False"
        ) from error
    found = [_as_tensor(a, b.dtype) for a, b in zip(found, wanted, strict=True)]
    off = [excess(a, b) for a, b in zip(found, wanted, strict=True)]
    if all(each <= 1 for each in off):
        return max(off, default=0.0)
    again = run(module, call)
    with Rounding():
        rounded = [run(module, call) for _ in range(3)]
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if off[number] <= 1 or excess(again[number], b) > 1:
            continue
        if excess(a, b, spread(b, [results[number] for results in rounded])) > 1:
            raise CheckError(
                f"{program.name}: result {number} of the program is other than the module's for arguments of sizes "
                f"{_sizes(call)}: {_apart(a, b)}; nothing was written. Please report the module, or compile it with "
                "check=False"
            )
    return max(each for each in [0.0, *off] if each <= 1)


def _as_tensor(found: Any, dtype: torch.dtype) -> Tensor:
    """A result as a tensor: without arguments it is a NumPy array, in which bfloat16 is uint16."""
    if isinstance(found, Tensor):
        return found
    tensor = torch.from_numpy(found)
    return tensor.view(dtype) if tensor.dtype == torch.uint16 and dtype == torch.bfloat16 else tensor


def _sizes(call: Call) -> str:
    leaves = [*flatten(list(call[0]), "")[1], *flatten(dict(call[1]), "")[1]]
    return ", ".join(str(list(leaf.shape)) for leaf in leaves) or "(none)"


def _apart(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"found {found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
    off = (found.double() - wanted.double()).abs()
    at = int(off.nan_to_num(nan=math.inf).argmax())
    return f"found {found.reshape(-1)[at].item():.7g}, expected {wanted.reshape(-1)[at].item():.7g}"


def _ends(program: Method, given: Call) -> Iterator[tuple[Call, float]]:
    """The example with all dims at the least, and with all at the most, each with about how many times it takes."""
    main, interface = program.function, program.interface
    if not main.ranges:
        return
    tensors = interface.bind(program.name, *given)
    least: dict[str, int] = {}
    for symbol, low, _ in main.ranges:
        least[symbol] = evaluate(low, least)
    most = {symbol: high for symbol, _, high in main.ranges}
    elements = sum(tensor.numel() for tensor in tensors)
    values = {value.name: value.shape for value in main.values}
    for sizes in (least, most):
        shapes = [shape_of(value.shape, sizes) for value in main.inputs]
        results = [shape_of(values[name], sizes) for name in main.outputs]
        taken = sum(map(math.prod, shapes))
        if min(map(min, shapes)) < 1 or taken > _MOST_TIMES * elements:
            continue
        if max(map(math.prod, (*shapes, *results))) > _MOST_ELEMENTS:
            continue
        other = [_resized(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]
        # Attention takes the square.
        yield arguments(interface.parameters, iter(other)), max(1.0, (taken / elements) ** 2)


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor's own numbers, over and over: whatever they mean stays valid."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            rows = torch.arange(size) % max(1, tensor.shape[axis])
            tensor = tensor.index_select(axis, rows)
    return tensor
