"""The rules that a split holds to: everything that reads one relies on them, and checks none again.

They are about the split as data: names that are there once, sizes that nothing can overflow, calls in an order that can
run. It knows nothing of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from doubleweave.ir.module_rules import module_problem
from doubleweave.ir.sizes import Shape, symbols
from doubleweave.ir.split import (
    CACHED,
    ENCODED,
    ENCODER,
    ITEM_BYTES,
    ROWS,
    FixedSizes,
    Function,
    Range,
    Segment,
    SizeRanges,
    Split,
    Value,
)

MOST_TOKENS = 2**24  # of a context and of a vocabulary, as in native/runner/run_file.cpp
MOST_ROWS = 2**16
_MOST_SIZE = 2**31 - 1
_MOST_BYTES = 2**40
_INPUTS = ("input_ids", "position_ids")  # the inputs of a language model that a session gives


def split_problem(split: Split) -> str | None:
    """The first rule that a split breaks, or None."""
    if not split.functions:
        return "there is no function"
    for names in ([s.name for s in split.segments], [f.name for f in split.functions]):
        if (twice := _twice(names)) is not None:  # the whole model's name is ""
            return f"the name {twice!r} is there twice"
    return _first(
        *(_segment_problem(segment) for segment in split.segments),
        *(_function_problem(split, place) for place in range(len(split.functions))),
    )


def language_model_problem(split: Split, vocab_size: int, max_context: int) -> str | None:
    """The first further rule that the split of a language model breaks, or None."""
    if not (1 <= max_context <= MOST_TOKENS and 1 <= vocab_size <= MOST_TOKENS):
        return f"the context or the vocabulary is not 1 to {MOST_TOKENS}"
    main, *encoders = split.functions
    if main.interface is not None or main.states or any(call.callee != "segment" for call in main.calls):
        return "the language model's own function has an interface or states, or calls others"
    if any(encoder.interface is None or encoder.states for encoder in encoders):
        return "an encoder has no interface, or it has states"
    if problem := _encoder_problem(split):
        return problem
    if not split.appending:
        return "no call appends to a cache or changes a state"
    if all(split.segment(call.segment).each_row for call in main.calls):
        return "no call takes whole chunks"
    outputs = [value for value in main.values if value.kind == "output"]
    if [(v.dtype, v.row_bytes) for v in outputs] != [("float32", 4 * vocab_size)]:
        return "its output is not the vocabulary's"
    if any(v.name not in _INPUTS or (v.dtype, v.row_bytes) != ("int64", 8) for v in main.inputs):
        return f"its inputs are not {' and '.join(_INPUTS)}"
    return _first(
        *(_rows_problem(value) for value in main.values),
        *(_chunk_problem(segment) for segment in split.decoder.segments),
        *(_binding_problem(split, place, max_context) for place in range(len(main.calls))),
    )


def _encoder_problem(split: Split) -> str | None:
    """The values that an encoder gives are the results of its function, in their order."""
    wanted = [(value.dtype, value.shape[2:]) for value in split.values if value.kind == "encoded"]
    if not wanted:
        return None
    found = [function.results for function in split.functions[1:] if function.name == ENCODER]
    if not found or [(value.dtype, value.shape[2:]) for value in found[0]] != wanted:
        return f"no function {ENCODER!r} gives what the decoder reads"
    if any(len(value.shape) != 3 or value.shape[0] != 1 for value in found[0]):
        return f"the function {ENCODER!r} gives no rows of one sequence"
    return None


def _first(*problems: str | None) -> str | None:
    return next((problem for problem in problems if problem), None)


def _twice(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _is_shape(shape: Shape, dtype: str) -> bool:
    """Whether the sizes are in range, and expressions of symbols; raises ValueError for an expression that is none."""
    num_bytes = ITEM_BYTES.get(dtype, 0)
    for size in shape:
        if isinstance(size, int):
            if not 0 <= size <= _MOST_SIZE:
                return False
            num_bytes *= max(size, 1)
        elif not symbols(size):
            return False
    return 1 <= num_bytes <= _MOST_BYTES


def _are_ranges(ranges: Iterable[Range], least: int) -> bool:
    """Whether each symbol has one range, from a number or an earlier symbol on."""
    known: set[str] = set()
    for symbol, low, high in ranges:
        is_low = least <= low <= high if isinstance(low, int) else low in known
        if not is_low or not high <= _MOST_SIZE or symbol in known or not symbol.isidentifier():
            return False
        known.add(symbol)
    return True


def _segment_problem(segment: Segment) -> str | None:
    shape, name = segment.shape, segment.name
    if isinstance(shape, FixedSizes):
        is_wrong = list(shape.sizes) != sorted({size for size in shape.sizes if 1 <= size <= _MOST_SIZE})
    else:
        is_wrong = not _are_ranges(shape.ranges, 1)
    if is_wrong:
        return f"segment {name} has no rows, or sizes out of order"
    if not all(_is_shape(port.shape, port.dtype) for port in (*segment.inputs, *segment.outputs)):
        return f"segment {name} has an input or output of no size or dtype"
    counts = (
        *(segment.contexts, segment.linear_weights, segment.attended_width, segment.weight_bytes),
        *(segment.chosen_weights, segment.expert_weights - segment.chosen_weights),
        *(segment.table_bytes, segment.weight_bytes - segment.table_bytes),
        *(segment.num_operators, segment.num_delegated, *(count for row in segment.traffic for count in row)),
        *(item.weights for item in segment.stored),
    )
    if not all(0 <= count <= 2**62 for count in counts):
        return f"segment {name} has a count that is out of range"
    return None


def _function_problem(split: Split, place: int) -> str | None:
    function = split.functions[place]
    segments = {segment.name: segment for segment in split.segments}
    # A function calls only later ones, so that none calls itself.
    functions = {other.name: other for other in split.functions[place + 1 :]}
    values = {value.name: value for value in function.values}
    if not _are_ranges(function.ranges, 0):
        return f"function {function.name!r} has a range of no sizes"
    states = {value.name for value in function.values if value.kind == "state"}
    # A language model's have no name behind its calls: each is read and written by one call.
    if function.interface is not None and {state.value for state in function.states} != states:
        return f"function {function.name!r} has a state that is none of its values"
    named = {*function.outputs, *(name for state in function.states for name in state)}
    if len(values) != len(function.values) or not named <= set(values):
        return f"function {function.name!r} names a value that is not there, or one twice"
    for call in function.calls:
        if not values.keys() >= {*call.reads, *call.writes}:
            return f"call {call.name} names a value that is not there"
        callees: Mapping[str, Segment | Function] = segments if call.callee == "segment" else functions
        if (callee := callees.get(call.segment)) is None:
            return f"call {call.name} names a segment that is not there"
        if (len(call.reads), len(call.writes)) != (len(callee.inputs), len(callee.outputs)):
            return f"call {call.name} reads or writes another number of values than {call.segment} does"
    if not all(_is_shape(value.shape, value.dtype) for value in values.values()):
        return "a value has an unknown dtype or no size"
    return _first(_order_problem(function), module_problem(function, segments, functions))


def _order_problem(function: Function) -> str | None:
    """Each value has one writer, which comes before its readers; a cache may be read by the call that appends."""
    ready = {value.name for value in function.values if value.kind in ("input", "state", "encoded")}
    cached = {value.name for value in function.values if value.kind == "cache"}
    states = {value.name for value in function.values if value.kind == "state"}
    changed: set[str] = set()
    for call in function.calls:
        if missing := set(call.reads) - ready - (cached & set(call.writes)):
            return f"call {call.name} reads {sorted(missing)[0]!r} before it is written"
        # A language model's are read and written by one call; a module's keep their names.
        own = states & set(call.reads) & set(call.writes) if function.interface is None else set()
        if own & changed:
            return f"call {call.name} changes a state that another changes"
        changed |= own
        if (ready - own) & set(call.writes) or len(set(call.writes)) != len(call.writes):
            return f"call {call.name} writes a value that has a writer"
        ready |= set(call.writes)
    if len(ready) != len(function.values):
        return "a value has no writer"
    return None


def _rows_problem(value: Value) -> str | None:
    if value.kind == "state":
        is_fixed = value.shape[:1] == (1,) and all(isinstance(size, int) for size in value.shape)
        return None if is_fixed else f"state {value.name} has no fixed size"
    if not 0 <= value.window <= (_MOST_SIZE if value.kind == "cache" else 0):
        return f"value {value.name} has a window that is none"
    rows = ENCODED if value.kind == "encoded" else ROWS
    is_rows = [size for size in value.shape if isinstance(size, str)] == [rows]
    if is_rows and value.kind in ("input", "cache"):
        is_rows = value.shape.index(rows) == 1  # sessions fill them row by row
    return None if is_rows else f"value {value.name} has no rows"


def _chunk_problem(segment: Segment) -> str | None:
    shape = segment.shape
    if isinstance(shape, FixedSizes):
        most = max(shape.sizes, default=0)
    else:
        most = next((found.high for found in shape.ranges if found.symbol == ROWS), 0)
    if not 1 <= most <= MOST_ROWS:
        return f"segment {segment.name} does not have 1 to {MOST_ROWS} rows"
    return None


def _binding_problem(split: Split, place: int, max_context: int) -> str | None:
    call = split.calls[place]
    segment, values = split.segment(call.segment), {value.name: value for value in split.values}
    if isinstance(segment.shape, SizeRanges):
        for symbol, _, high in segment.shape.ranges:
            if symbol == CACHED and high < max_context:
                return f"segment {segment.name} reads {high} rows of a cache of {max_context}"
    ports = (*segment.inputs, *segment.outputs)
    for name, port in zip((*call.reads, *call.writes), ports, strict=True):
        value = values[name]
        sizes: Sequence[int | str] = [size for size in port.shape if isinstance(size, str)]
        if (ENCODED in sizes) != (value.kind == "encoded"):
            return f"call {call.name} takes {name} for another kind of tensor"
        if len(sizes) > 1 or not set(sizes) <= {ROWS, CACHED, ENCODED}:
            return f"segment {segment.name} has a size that is neither {ROWS} nor {CACHED}"
        fixed = ITEM_BYTES[port.dtype]
        for size in port.shape:
            fixed *= size if isinstance(size, int) else 1
        rows = 1 if sizes or value.kind == "state" else max_context
        if value.kind == "state" and not (segment.each_row and name in call.reads and name in call.writes):
            return f"call {call.name} has the state {name}, but does not run row by row over it"
        if port.dtype != value.dtype or fixed != value.row_bytes * rows:
            return f"call {call.name} takes {name} for another kind of tensor"
    return None
