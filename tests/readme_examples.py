"""Runs the README's Python examples as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def run(number: int, folder: Path) -> str:
    """Run one of the README's Python examples; returns what it prints."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[number]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
