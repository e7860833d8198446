"""The line of the user's own code that an error message names."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_OURS = str(Path(__file__).parents[2])
_TORCHS = str(Path(torch.__file__).parent)


def user_site(error: BaseException | None = None) -> str:
    """The innermost frame of the user's code, now or in an error's traceback: "model.py:12, in forward"."""
    stack = traceback.extract_stack() if error is None else traceback.extract_tb(error.__traceback__)
    for frame in reversed(stack):
        if not frame.filename.startswith((_OURS, _TORCHS, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
    return "an unknown place"
