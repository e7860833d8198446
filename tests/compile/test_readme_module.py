"""The README's example of any module runs as it stands."""

from __future__ import annotations

from pathlib import Path

from readme_examples import run


def test_module_example_runs(tmp_path: Path) -> None:
    assert run(1, tmp_path).splitlines() == [f"torch.Size([{size}])" for size in ("100, 6", "7, 9", "40, 2")]
