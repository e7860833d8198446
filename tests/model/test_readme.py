"""The README's example of a language model runs as it stands."""

from __future__ import annotations

from pathlib import Path


def test_language_model_example_runs(readme_folder: Path) -> None:
    printed = (readme_folder / "printed.txt").read_text()
    assert "Paris" in printed
    assert "(1, 3, 576)" in printed
