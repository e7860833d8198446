"""A crash inside a method: one sentence, and an exit code that the caller expects."""

from __future__ import annotations

import subprocess
import sys

import pytest


def ends(code: str) -> tuple[int, str]:
    code = f"import os, signal, threading, doubleweave._native as n\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


WILD = 'm = n.Program({path!r}).load("add_int64"); m.bind_input(0, 64, [2, 3]); m.bind_input(1, 64, [2, 3])'
MEND = "compile the program again, or keep the method's segment on the CPU\n"


def test_a_crash_inside_a_method_names_it(toy_path):
    wild = WILD.format(path=str(toy_path))
    code = f"{wild}\nout = bytearray(96)\nimport ctypes\n"
    code += "m.bind_output(0, ctypes.addressof(ctypes.c_char.from_buffer(out)), 96)\n"
    assert ends(f"{code}n.say_crashes(2)\nm.execute()") == (
        2,
        f"doubleweave: method 'add_int64' crashed (segmentation fault); {MEND}",
    )
    assert ends(f"{code}m.execute()")[0] < 0, "without it the process ends by the signal"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGABRT", "abort"),
        ("SIGBUS", "bus error"),
        ("SIGILL", "illegal instruction"),
        ("SIGFPE", "arithmetic error"),
    ],
)
def test_each_signal_is_said(name, words):
    code = f"n.say_crashes(7)\nos.kill(os.getpid(), signal.{name})\nthreading.Event().wait(5)"
    assert ends(code) == (7, f"doubleweave: the program, outside any method, crashed ({words})\n")


def test_it_is_said_where_standard_error_is_redirected():
    code = "n.say_crashes(2)\nn.say_crashes(3)\nos.close(2)\nos.abort()"
    assert ends(code) == (3, "doubleweave: the program, outside any method, crashed (abort)\n")
