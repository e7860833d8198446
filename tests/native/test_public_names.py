"""Every public name is there, and documented."""

from __future__ import annotations

import pytest

import doubleweave


@pytest.mark.parametrize("name", doubleweave.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(doubleweave, name).__doc__
