"""The README's example of a language model runs as it stands."""

from __future__ import annotations

from pathlib import Path

from readme_examples import run


def test_language_model_example_runs(tmp_path: Path) -> None:
    printed = run(0, tmp_path)
    assert "Paris" in printed
    assert "(1, 3, 576)" in printed
