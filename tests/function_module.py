"""A module of one function, for tests of single operators. Needs torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Of(nn.Module):
    """A module that computes a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)
