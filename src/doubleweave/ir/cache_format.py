"""The formats that a cache keeps keys and values in, as the values of a split show them.

int8 rows are [1, T, heads, head size + 4], with a float32 scale behind the numbers of each head; rows of other formats
are [1, T, heads * head size]. What the numbers mean is written in compiler/graph/cache_rows.py.
"""

from __future__ import annotations

from doubleweave.ir.split import Value

CACHE_FORMATS = ("float32", "bfloat16", "float16", "int8")
SCALE_BYTES = 4


def heads_of(value: Value) -> tuple[int, int]:
    """(heads, numbers in each) of a row of a cache; one head where the format does not ask for them."""
    *_, heads, width = value.shape
    return (int(heads), int(width) - SCALE_BYTES) if value.dtype == "int8" else (1, int(width))
