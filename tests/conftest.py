"""Fixtures that several test files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory):
    """The path of a program of small methods (native_toys.py); lowering it takes some seconds, once."""
    from native_toys import toy_program

    return toy_program(tmp_path_factory.mktemp("native"))
