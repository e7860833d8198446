"""Read a recipe: a TOML file that says what a program's weights, tables and cache are kept in, and by which text.

```toml
name = "careful"        # shown by inspect; the file's name without it
quantize = "8da4w"      # what everything has that is not named below
table = "int8"
cache = "bfloat16"

[keep]                  # as --keep: by role, segment or pattern; later ones count before earlier ones
down = "int8"
"block_0.*" = "int8"
```

Its keys are options of compiling a language model, and mean what they mean there. `calibrate` names a file beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doubleweave.errors import PolicyError
from doubleweave.files import read_toml

NAME = "name"
_TEXTS = (NAME, "quantize", "table", "cache", "calibrate")
_KEEP, _BUDGET = "keep", "budget"
_KEYS = (*_TEXTS, _BUDGET, _KEEP)


def read_recipe(path: Path) -> dict[str, Any]:
    """The options that a file gives, and its name; PolicyError for one that is no recipe."""
    try:
        found = read_toml(path)
    except OSError as error:
        raise PolicyError(f"recipe: {path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise PolicyError(f"recipe: {path} is no TOML ({error})") from None
    if unknown := sorted(found.keys() - {*_KEYS}):
        raise PolicyError(f"recipe: {path}: found key {unknown[0]!r}, expected only {', '.join(_KEYS)}")
    for key in _TEXTS:
        if not isinstance(found.get(key, ""), str):
            raise PolicyError(f"recipe: {path}: found {key} = {found[key]!r}, expected a text")
    kept = found.get(_KEEP, {})
    if not isinstance(kept, dict) or not all(isinstance(into, str) for into in kept.values()):
        raise PolicyError(f"recipe: {path}: found {_KEEP} = {kept!r}, expected a table such as down = 'int8'")
    if "calibrate" in found:
        found["calibrate"] = str(path.parent / found["calibrate"])
    return {NAME: path.stem, **found}


def beside_given(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options with those that were given beside it, which count before it; of `keep` both, its own first."""
    made = {key: value for key, value in options.items() if key != NAME}
    for key, value in given.items():
        if key == _KEEP and isinstance(value, Mapping):
            made[_KEEP] = {**made.get(_KEEP, {}), **value}
        elif value is not None:
            made[key] = value
    return made
