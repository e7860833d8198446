"""These tests need a compiled toy program, and so the compile extra; a program once compiled needs none of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import needs


def pytest_collect_file() -> None:
    needs.compile_extra()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker("programs")


@pytest.fixture(scope="session")
def third_party() -> str:
    """The folder of sources that a build of doubleweave-run has fetched already, "" for none."""
    found = (Path(__file__).parents[2] / "build").glob("*/third_party/pytorch_tokenizers-*/")
    return str(next(found, ""))


@pytest.fixture(scope="module", params=["bounded", "static"])
def program(request: pytest.FixtureRequest, toy_program: Any, toy_static_program: Any) -> Any:
    """The toy in float32, with bounded rows and in fixed sizes."""
    return toy_program if request.param == "bounded" else toy_static_program


@pytest.fixture(scope="session")
def dtypes_dir(made_once: Callable[..., Path]) -> Path:
    """A program with one input and one result of each of several dtypes."""
    import torch
    from torch.export import Dim

    import doubleweave

    class Dtypes(torch.nn.Module):
        def forward(self, x: Any, half: Any, brain: Any, number: Any, mask: Any) -> Any:
            return {
                "x": torch.where(mask, x, 2 * x).unsqueeze(1) + torch.arange(3),
                "half": half * 2,
                "brain": brain + 1,
                "number": number - 1,
                "mask": ~mask,
            }

    rows = Dim("T", min=1, max=64)
    args = (
        torch.ones(5),
        torch.ones(5, 2, dtype=torch.float16),
        torch.ones(5, dtype=torch.bfloat16),
        torch.ones(5, dtype=torch.int64),
        torch.ones(5, dtype=torch.bool),
    )
    return made_once(
        "dtypes", lambda out: doubleweave.compile(Dtypes(), args, dynamic_shapes=[{0: rows}] * 5, out=out)
    )
