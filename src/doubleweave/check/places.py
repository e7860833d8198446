"""Where a language model is checked: how many tokens are cached, and in which chunks the next ones come.

Knows nothing of programs that run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from doubleweave.ir.cache_format import heads_of
from doubleweave.ir.split import Split

_LARGEST_MARK = 10_000  # a cache may keep float16
SINGLES = 3  # tokens one by one behind a prompt
# Names of settings whose number is a length at which a model changes what it does: a window's rows, a block of chunked
# attention, the length that a scaled rotary embedding begins at, the positions between two steps of a temperature.
_LENGTHS = re.compile(
    r"window|chunk_size|original_max|max_position|floor_scale|max_seq|max_distance|log_scaling"
)


class Place(NamedTuple):
    """`chunks` are the numbers of tokens of each run, behind `start` cached tokens."""

    start: int
    chunks: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.chunks)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    def cut(self, chunks: Sequence[int]) -> Place:
        """The beginning of the place in other chunks."""
        left, found = self.num_tokens, []
        for size in chunks:
            found.append(min(size, left))
            left -= found[-1]
        return Place(self.start, tuple(filter(None, found)))


def first_place(most_rows: int, max_context: int, lengths: Sequence[int], full: int = 2) -> Place:
    """So many full chunks, a remainder and single tokens; on to just behind the lengths that lie near."""
    prompt = full * most_rows + most_rows // 3 + 1
    # Running past a near length is the plainest way to check both of its sides.
    prompt = max([prompt, *(length + 2 for length in lengths if length <= prompt + 4 * most_rows)])
    prompt = max(1, min(prompt, max_context - SINGLES))
    full, rest = divmod(prompt, most_rows)
    singles = min(SINGLES, max_context - prompt)
    return Place(0, (*[most_rows] * full, *[rest] * bool(rest), *[1] * singles))


def far_places(first: Place, max_context: int, lengths: Sequence[int]) -> list[Place]:
    """Four tokens around each length that `first` does not reach: in a chunk, and one by one."""
    far = [length for length in lengths if first.end < length <= max_context - 2]
    return [Place(length - 2, chunks) for length in far for chunks in ((4,), (1, 1, 1, 1))]


def before_border(first: Place, border: int) -> list[Place]:
    """Tokens up to the border behind which all tokens of a text have other frequencies, where `first` goes past it."""
    if not 2 < border < first.end:
        return []
    return [Place(2, (min(border - 2, first.chunks[0]),))]


def marked_rows(split: Split, num_tokens: int) -> dict[str, Tensor]:
    """Rows for a cache of so many tokens, float32 [1, num_tokens, width] by value whatever format it keeps: zeros but
    for the first four tokens. States are small random numbers.

    Their values are large enough to count among as many keys of equal scores, so that it shows in every result whether
    they are still within a window.
    """
    found = {}
    generator = torch.Generator().manual_seed(20261)
    for value in split.values if num_tokens else ():
        if value.kind == "cache":
            rows = torch.zeros(1, num_tokens, math.prod(heads_of(value)))
            if value.name.startswith("v"):
                rows[:, :4] = min(num_tokens, _LARGEST_MARK) * torch.randn(
                    rows[:, :4].shape, generator=generator
                )
            found[value.name] = rows
        elif value.kind == "state":
            found[value.name] = 0.1 * torch.randn(tuple(map(int, value.shape)), generator=generator)
    return found


def lengths_of(config: Any, max_context: int) -> list[int]:
    """The lengths within `max_context` at which a model of this config changes what it does, in order."""
    found = {number for name, number in _numbers(config.to_dict()) if _LENGTHS.search(name)}
    return sorted(number for number in found if 1 < number < max_context)


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif type(value) is int:
            yield str(name), value
