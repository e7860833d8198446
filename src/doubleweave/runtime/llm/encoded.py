"""What an encoder gave for a sequence: keys and values that every chunk of the decoder reads.

It knows nothing of tokens or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from doubleweave import _native
from doubleweave.errors import InputError
from doubleweave.ir.split import ENCODED, ENCODER, SizeRanges, Split
from doubleweave.runtime.module.method import Method
from doubleweave.runtime.native_errors import as_run_errors


class Encoded:
    """Memory for the rows of one sequence: each call of `encode` writes them anew, `num_rows` is 0 before the first."""

    def __init__(self, split: Split, encoder: Method | None) -> None:
        self._values = [value for value in split.values if value.kind == "encoded"]
        self._encoder = encoder
        self.num_rows = 0
        ranges = [s.shape.ranges for s in split.segments if isinstance(s.shape, SizeRanges)]
        most = max((r.high for found in ranges for r in found if r.symbol == ENCODED), default=0)
        with as_run_errors():  # memory is committed as rows are written
            self._buffers = _native.Buffers([most * value.row_bytes for value in self._values])

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def takes_tokens(self) -> bool:
        """Whether the encoder takes token ids."""
        return self._encoder is not None and self._encoder.function.inputs[0].dtype == "int64"

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows."""
        return self.num_rows * sum(value.row_bytes for value in self._values)

    def regions(self) -> dict[str, _native.Region]:
        return {value.name: self._buffers.region(number) for number, value in enumerate(self._values)}

    def encode(self, encoder_input: Any) -> None:
        """Run the encoder; InputError for what it does not take, and for a model without one."""
        if not self._values or self._encoder is None:
            raise InputError("encode: this model has no encoder; append a prompt")
        if isinstance(encoder_input, (list, tuple)):
            encoder_input = np.asarray(encoder_input)
        found = self._encoder(encoder_input)
        results: Sequence[Any] = found if isinstance(found, (tuple, list)) else (found,)
        self.num_rows = int(results[0].shape[1])
        for number, result in enumerate(results):
            self._buffers.view(number, list(result.shape))[:] = np.asarray(result)

    def check(self) -> None:
        """InputError before the first sequence was encoded."""
        if self._values and not self.num_rows:
            raise InputError(
                f"the model's decoder reads what its {ENCODER} gives, and nothing was encoded; call "
                "session.encode(…), or give generate encoder_input=…"
            )
