"""Needs of a folder's tests: called as its files are collected, each skips the folder where something is missing."""

from __future__ import annotations

import functools

import pytest


def native_module() -> None:
    pytest.importorskip("doubleweave._native")


def compile_extra() -> None:
    native_module()
    for name in ("torch", "transformers", "executorch.exir"):
        pytest.importorskip(name)
    quick_exports()


@functools.cache
def quick_exports() -> None:
    """Spare each export two thirds of its time, with the same result.

    torch looks for its composite operators in every export, and overrides them for each device that it knows; here
    they are looked for once, and overridden for the CPU.
    """
    import torch
    from torch._export import utils
    from torch.export import exported_program

    name = "_collect_all_valid_cia_ops_for_namespace"
    setattr(utils, name, functools.cache(getattr(utils, name)))
    keys = torch._C.DispatchKey
    exported_program._AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE = [keys.AutogradCPU]
    exported_program._BACKEND_KEYS_TO_OVERRIDE = [keys.CPU, keys.Meta]
