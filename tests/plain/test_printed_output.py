"""What native code prints is caught, also where it ends in an error; nothing of it reaches the process's own output."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from doubleweave.vendors.printed_output import captured


def test_both_outputs_are_caught(capfd):
    def talk() -> int:
        os.write(1, b"out ")
        os.write(2, b"err")
        return 7

    assert captured(talk) == (7, "out err")
    assert capfd.readouterr() == ("", "")


def test_an_error_carries_what_was_printed(capfd):
    def fail() -> None:
        os.write(2, b"the reason")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no") as caught:
        captured(fail)
    assert caught.value.printed == "the reason"
    os.write(2, b"again")
    assert capfd.readouterr() == ("", "again")


def test_after_silence_nothing_is_said():
    script = """
import os
from doubleweave.vendors.printed_output import silence_errors
os.write(2, b"before")
silence_errors()
os.write(2, b"after")
print("out")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "before")
