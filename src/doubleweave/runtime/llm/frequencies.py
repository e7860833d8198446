"""The frequencies that a session's tokens are turned by: LongRoPE's short ones, or behind a border the long ones.

A text longer than the border has the long frequencies for all its tokens. The cache holds keys that were turned
already, so a session that passes the border, or comes back from behind it, computes its tokens anew: as transformers
does in `Phi3ForCausalLM.prepare_inputs_for_generation`. For that it keeps what was appended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Appended(NamedTuple):
    """What came into the model: `given` has a row a token, for the entry of that name."""

    entry: str
    given: npt.NDArray[Any]


class Frequencies:
    """The positions that runs read, int64, and what has to be run anew when they change; `border` 0 means never."""

    def __init__(self, border: int, num_positions: int) -> None:
        self.positions = np.arange(num_positions, dtype=np.int64)
        self._border = border
        self._is_long = False
        self._expected = 0
        self._appended: list[Appended] | None = []  # None where rows came into the cache without tokens

    def expect(self, num_tokens: int) -> None:
        """The text will have so many tokens: the frequencies of that length are taken from now on."""
        self._expected = num_tokens

    def change(self, num_tokens: int) -> list[Appended]:
        """Take the frequencies of a text of so many tokens; what has to be run anew, all tokens so far or none."""
        is_long = 0 < self._border < max(num_tokens, self._expected)
        if is_long == self._is_long:
            return []
        self._is_long = is_long
        np.bitwise_not(self.positions, out=self.positions)
        again = self._appended or []
        self._appended = None if self._appended is None else []
        return again

    def note(self, entry: str, given: npt.NDArray[Any]) -> None:
        if self._border and self._appended is not None:
            self._appended.append(Appended(entry, given.copy()))

    def truncate(self, num_tokens: int) -> None:
        kept: list[Appended] = []
        for entry, given in self._appended or ():
            kept += [Appended(entry, given[:num_tokens])] if num_tokens > 0 else []
            num_tokens -= len(given)
        self._appended = None if self._appended is None else kept

    def forget(self) -> None:
        """No token is left."""
        self._appended, self._expected = [], 0

    def lose(self) -> None:
        """Rows came into the cache, or left it, that no tokens stand for: nothing can be run anew."""
        self._appended = None
