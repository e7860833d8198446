"""Damage to files, by a seeded dice: bytes that flip, go or come, and JSON whose values become others."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_NUMBERS = (
    0,
    1,
    -1,
    2,
    2**31 - 1,
    2**31,
    -(2**31),
    2**53,
    2**63 - 1,
    2**63,
    -(2**63),
    10**40,
    0.5,
    -0.0,
    1e308,
)
_TEXTS = ("", "junk", "T", "S", "T*T", "T**8", "Max(T, S)", "0", "-1", "T//0", "float32", "\ud800", "é" * 300)
_JUNK = (*_NUMBERS, *_TEXTS, None, True, False, [], {}, [None], [[]], {"a": 1}, [[[[[[]]]]]])
_NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))


def damaged(data: bytes, dice: random.Random) -> bytes:
    """The data with one damage: other than before, or equal by chance."""
    changed = bytearray(data)
    at, size = dice.randrange(len(data)), dice.choice((1, 4, 64, 4096))
    match dice.randrange(6):
        case 0:
            changed[at] ^= 1 << dice.randrange(8)
        case 1:
            changed[at : at + size] = dice.randbytes(min(size, len(data) - at))  # as long as before
        case 2:
            changed[at : at + size] = bytes(min(size, len(data) - at))
        case 3:
            del changed[at:]
        case 4:
            del changed[at : at + size]
        case _:
            changed[at:at] = dice.randbytes(size)
    return bytes(changed)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) of the data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        yield data, key
        yield from _places(item)


def _like(value: int | str, places: list[tuple[Any, Any]], dice: random.Random) -> int | str:
    """Another number near this one, or a text that stands elsewhere: what agrees with itself gets past more checks."""
    if isinstance(value, int):
        return dice.choice((value + 1, value - 1, 2 * value, value // 2, 8 * value, value + 64))
    texts = [held[key] for held, key in places if type(held[key]) is str]
    return str(dice.choice((*_TEXTS, *texts)))


def other_json(data: Any, dice: random.Random) -> Any:
    """The data of a JSON file with a value or key deleted, doubled, swapped with another, or made another, in one place
    or wherever the value stands."""
    changed = copy.deepcopy(data)
    places = list(_places(changed))
    held, key = dice.choice(places)
    match dice.randrange(11):
        case 0:
            del held[key]
        case 1:
            other, place = dice.choice(places)
            held[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(held[key])
        case 2 if isinstance(held, list):
            held.insert(key, copy.deepcopy(held[key]))
        case 3 if isinstance(held, dict):
            held[dice.choice(_TEXTS)] = held.pop(key)
        case 4 if type(held[key]) is int:
            held[key] += dice.choice((-1, 1, 2**20, -held[key], -2 * held[key]))
        case 5:
            held[key] = dice.choice(_NO_NUMBERS)
        case 6:
            for _ in range(dice.choice((5, 200))):
                held[key] = [held[key]]
        case 7 | 8 | 9 if type(held[key]) in (int, str):
            old, new = held[key], _like(held[key], places, dice)
            for other, place in places:
                if type(other[place]) is type(old) and other[place] == old:
                    other[place] = new
        case _:
            held[key] = dice.choice(_JUNK)
    return changed


def with_double_keys(data: Any, dice: random.Random) -> str:
    """A JSON text in which one key of the outermost object stands twice, with two values."""
    key = dice.choice(list(data))
    return json.dumps(data)[:-1] + f", {json.dumps(key)}: {json.dumps(dice.choice(_JUNK))}}}"
