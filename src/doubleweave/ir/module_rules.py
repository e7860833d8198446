"""The further rules of a function with an interface, a module or a nested one: its sizes follow from its inputs, and
each call passes tensors of the kind that its callee takes.

It knows nothing of files, and of language models nothing either.
"""

from __future__ import annotations

from collections.abc import Mapping

from doubleweave.ir.sizes import symbols
from doubleweave.ir.split import ROWS, Call, FixedSizes, Function, Port, Segment, Value


def module_problem(
    function: Function, segments: Mapping[str, Segment], functions: Mapping[str, Function]
) -> str | None:
    """The first rule that a function breaks, or None; `segments` and `functions` are those that it may call, by name.
    Raises ValueError for names that no parameters have."""
    interface = function.interface
    if interface is None:
        return None
    interface.signature()
    counts = (len(interface.input_names), interface.returns.num_tensors)
    if counts != (len(function.inputs), len(function.outputs)):
        return f"function {function.name!r} has another number of inputs or outputs than its interface"
    if problem := _sizes_problem(function) or _states_problem(function):
        return problem
    for call in function.calls:
        callee: Segment | Function
        callee = segments[call.segment] if call.callee == "segment" else functions[call.segment]
        if problem := _call_problem(function, call, callee):
            return problem
    return None


def _sizes_problem(function: Function) -> str | None:
    """Each symbol is solved from the inputs, plain ones first, as schedule/symbols.py does it."""
    ranges = {found.symbol for found in function.ranges}
    known: set[str] = set()
    for is_plain in (True, False):
        for value in function.inputs:
            for size in value.shape:
                unknown = symbols(size) - known
                if not is_plain and (len(unknown) > 1 or not unknown <= ranges):
                    return f"input {value.name} has a size that cannot be solved"
                known |= unknown if size in ranges or not is_plain else set()
    for value in function.values:
        if not all(symbols(size) <= known for size in value.shape):
            return f"value {value.name} has a size that nothing gives"
    return None


def _states_problem(function: Function) -> str | None:
    values = {value.name: value for value in function.values}
    for state in function.states:
        value, after = values[state.value], values[state.next]
        if value.kind != "state" or not all(isinstance(size, int) for size in value.shape):
            return f"state {value.name} has no fixed size"
        if (value.dtype, len(value.shape)) != (after.dtype, len(after.shape)):
            return f"state {value.name} becomes another kind of tensor"
    return None


def _call_problem(function: Function, call: Call, callee: Segment | Function) -> str | None:
    values = {value.name: value for value in function.values}
    takes: tuple[tuple[Port | Value, ...], ...] = (
        (callee.inputs, callee.outputs) if isinstance(callee, Segment) else (callee.inputs, callee.results)
    )
    for names, ports in zip((call.reads, call.writes), takes, strict=True):
        for name, port in zip(names, ports, strict=True):
            value = values[name]
            if (value.dtype, len(value.shape)) != (port.dtype, len(port.shape)):
                return f"call {call.name} takes {name} for another kind of tensor"
    if not isinstance(callee, Segment) or not isinstance(callee.shape, FixedSizes) or not callee.shape.sizes:
        return None
    # Chunk by chunk: the rows are those of an input, and where a state goes along, no chunk may be padded.
    if not any(ROWS in port.shape for port in callee.inputs):
        return f"segment {callee.name} has fixed numbers of rows, and no input with rows"
    states = {name for state in function.states for name in state}
    if states & {*call.reads, *call.writes} and 1 not in callee.shape.sizes:
        return f"segment {callee.name} changes a state in chunks, and takes no single row"
    return None
