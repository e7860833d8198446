"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.executorch
@pytest.mark.model
def test_python_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "(1, 3, 576)" in result.stdout


def test_every_command_is_named() -> None:
    text = README.read_text()
    for command in ("compile", "run", "inspect", "bench", "score"):
        assert f"doubleweave {command} " in text
