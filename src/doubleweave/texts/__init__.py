"""The texts that come with the package: one that recipes are calibrated on, and several that they are judged by.

Those in held_out are never calibrated on. They are of several kinds, because a recipe may suit one and harm another: an
essay, documentation, a file of Python, conversations, and German. Ours, and frozen, so that numbers can be compared.
"""

from __future__ import annotations

from importlib.resources import files

CALIBRATION = "calibration"  # its name among scores
_FOLDER = files("doubleweave") / "texts"


def calibration_text() -> str:
    return (_FOLDER / "calibration.txt").read_text()


def held_out_texts() -> dict[str, str]:
    """The texts by name."""
    folder = _FOLDER / "held_out"
    names = ("prose", "documentation", "code", "chat", "german")
    return {name: (folder / f"{name}.txt").read_text() for name in names}
