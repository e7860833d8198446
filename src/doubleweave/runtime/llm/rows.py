"""Rows of embeddings as a caller gives them, checked. It knows nothing of sessions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from doubleweave.errors import InputError
from doubleweave.runtime.module.arrays import dtype_name, readable


def checked_rows(rows: Any, width: int) -> npt.NDArray[np.float32]:
    """float32 [T, width] of an array or tensor of that shape or [1, T, width]. Raises InputError for anything else, for
    no rows, and for numbers that are none."""
    wanted = f"expected float32 [T, {width}], a row a token"
    if not hasattr(rows, "shape") or not hasattr(rows, "dtype"):
        raise InputError(f"embeddings: found a {type(rows).__name__}, {wanted}: an array or a tensor")
    shape = list(rows.shape)
    if len(shape) == 3 and shape[0] > 1 and shape[2] == width:
        raise InputError(
            f"embeddings: found shape {shape}, {wanted}: a cache holds one sequence; reshape to "
            f"[{shape[0] * shape[1]}, {width}] where they stand one behind the other"
        )
    if shape[:-2] not in ([], [1]) or len(shape) < 2 or shape[-1] != width:
        raise InputError(
            f"embeddings: found shape {shape}, {wanted} (the model's embeddings are {width} wide)"
        )
    if dtype_name(rows) != "float32":
        raise InputError(f"embeddings: found dtype {dtype_name(rows)}, {wanted}")
    if shape[-2] == 0:
        raise InputError("embeddings: found no rows, expected at least one")
    found: npt.NDArray[np.float32] = np.asarray(readable(rows, "embeddings")).reshape(-1, width)
    if not np.isfinite(found).all():
        # Later tokens attend to these rows: all that follows would be no numbers either.
        row = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        raise InputError(f"embeddings: found NaN or infinity in row {row}, expected finite numbers")
    return found
