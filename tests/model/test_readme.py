"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def run(number: int, folder: Path) -> str:
    """Run one of the README's Python examples; returns what it prints."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[number]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.executorch
@pytest.mark.model
def test_language_model_example_runs(tmp_path: Path) -> None:
    printed = run(0, tmp_path)
    assert "Paris" in printed
    assert "(1, 3, 576)" in printed


@pytest.mark.executorch
def test_module_example_runs(tmp_path: Path) -> None:
    assert run(1, tmp_path).splitlines() == [f"torch.Size([{size}])" for size in ("100, 6", "7, 9", "40, 2")]


def test_every_command_is_named() -> None:
    text = README.read_text()
    for command in ("compile", "run", "inspect", "bench", "score"):
        assert f"doubleweave {command} " in text
