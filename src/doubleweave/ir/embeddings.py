"""A language model entered behind its lookup: rows of embeddings come in, in the place of token ids.

The model's other calls are as they were, so what holds of their split holds of this one. It knows nothing of where rows
come from.
"""

from __future__ import annotations

from dataclasses import replace

from doubleweave.ir.split import ROWS, Call, Function, Split, Value

LOOKUP = "embed_tokens"  # the segment of the model's input embeddings
_IDS = "input_ids"


def why_no_rows(split: Split) -> str:
    """Why a model does not take rows in the place of its tokens' embeddings; "" where it does."""
    readers = [call for call in split.calls if _IDS in call.reads]
    if others := [call.name for call in readers if call.segment != LOOKUP]:
        return (
            f"the model reads token ids in {', '.join(others)} as well as where it looks up embeddings, and rows have "
            "no ids"
        )
    if len(readers) != 1 or readers[0].reads != (_IDS,) or len(readers[0].writes) != 1:
        return "the model does not look its tokens up in one table, whose rows others could replace"
    value = split.main.value(readers[0].writes[0])
    if (value.kind, value.dtype, len(value.shape), value.shape[1:2]) != ("chunk", "float32", 3, (ROWS,)):
        return (
            f"what the model looks up is {value.type_text} ({value.kind}), expected float32 rows of one chunk"
        )
    return ""


def lookup_of(split: Split) -> Call:
    """The call that looks token ids up. `why_no_rows` must be ""."""
    return next(call for call in split.calls if _IDS in call.reads)


def behind_lookup(split: Split) -> tuple[Split, Value]:
    """The same model without its lookup, and the input that its rows come in by: float32 [1, T, width].

    `why_no_rows` must be "".
    """
    lookup, main = lookup_of(split), split.main
    rows = replace(main.value(lookup.writes[0]), kind="input")
    values = tuple(rows if v.name == rows.name else v for v in main.values if v.name != _IDS)
    calls = tuple(call for call in main.calls if call is not lookup)
    function = Function(main.name, calls, values, main.outputs, main.ranges, main.states, main.interface)
    return Split(split.segments, (function, *split.functions[1:])), rows
