"""Needs of a folder's tests: called as its files are collected, each skips the folder where something is missing."""

from __future__ import annotations

import pytest


def native_module() -> None:
    pytest.importorskip("doubleweave._native")


def compile_extra() -> None:
    native_module()
    for name in ("torch", "transformers", "executorch.exir"):
        pytest.importorskip(name)
