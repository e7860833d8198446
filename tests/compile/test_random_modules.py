"""Random small modules under random policies (random_modules.py): the program against eager torch, at allowed sizes.

RANDOM_MODULES=2000 RANDOM_SEED=1 pytest tests/compile/test_random_modules.py draws more cases, and other ones.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.internal.conjecture import engine
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import doubleweave as dw
from doubleweave.ir.sizes import shape_of
from random_modules import Case, cases

NUM_CASES = int(os.environ.get("RANDOM_MODULES", "120"))
SEED = int(os.environ.get("RANDOM_SEED", "0"))
NUM_SHARDS = 4
TOLERANCE = 1e-4


@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_programs_do_what_their_modules_do(
    shard: int, lowered_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_SHRINKING_SECONDS", 60)
    seed = NUM_SHARDS * SEED + shard
    print(f"seed {seed} (RANDOM_SEED={SEED}, shard {shard})")
    wanted = -(-NUM_CASES // NUM_SHARDS)
    seen: set[str] = set()
    failed = False

    # Hypothesis draws some cases several times.
    @hypothesis.seed(seed)
    @settings(max_examples=10 * wanted, suppress_health_check=list(HealthCheck))
    @given(cases())
    def agrees(case: Case) -> None:
        nonlocal failed
        if not failed and (case.what in seen or len(seen) == wanted):
            return
        try:
            check(case)
        except BaseException:
            failed = True  # from now on cases are run as often as they come
            raise
        seen.add(case.what)

    agrees()
    assert len(seen) == wanted


def check(case: Case) -> None:
    eager = copy.deepcopy(case.module)
    program = compiled(case)
    # Compiling leaves the module as it was.
    assert_same(case.module.state_dict(), eager.state_dict(), "torch")
    assert not any("forward" in vars(module) for module in case.module.modules())
    assert set(program.state) == {name for name, _ in eager.named_buffers()}
    seen: dict[nn.Module, Any] = {}  # the last call of each module
    for module in eager.modules():
        module.register_forward_pre_hook(lambda *call: seen.update({call[0]: call[1:]}), with_kwargs=True)
    for number, (sizes, kind) in enumerate(case.calls):
        run_both(program, program, eager, eager, case.tensors(sizes, number), {}, kind)
    for name, module in eager.named_modules():
        if name in program.methods:
            check_method(case, program, eager, name, *seen[module])


def compiled(case: Case) -> Any:
    shapes: Any = case.dims() if case.dynamic else None
    if isinstance(case.policy.get(""), dw.Dynamic) and case.policy[""].dims:
        shapes = None
    elif shapes and case.style == "by position":
        shapes = tuple(shapes.values())
    args: Any = case.tensors(case.most, 9)
    kwargs: dict[str, Any] = {}
    if case.style == "y by name":
        args, kwargs = args[:1], dict(zip("y", args[1:], strict=False))
    return dw.compile(case.module, args, kwargs, dynamic_shapes=shapes, policy=case.policy)


def check_method(case: Case, program: Any, eager: nn.Module, name: str, args: Any, kwargs: Any) -> None:
    """Call a nested module by itself, as it was called last and with other sizes."""
    variants = (found for title, found in program.methods.items() if title.partition("#")[0] == name)
    method = next(found for found in variants if takes(found, args, kwargs))
    generator = np.random.default_rng(case.seed)
    function = method.function
    sizes = {s: int(generator.integers(low, min(high, low + 20) + 1)) for s, low, high in function.ranges}
    inputs = iter(function.inputs)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        shape = shape_of(next(inputs).shape, sizes)
        if leaf.is_floating_point():
            return torch.from_numpy(generator.standard_normal(shape, np.float32))
        return torch.from_numpy(generator.integers(0, 2, shape)).to(leaf.dtype)

    args, kwargs = pytree.tree_map(other, (args, kwargs))
    run_both(method, program, eager.get_submodule(name), eager, args, kwargs, "torch")


def takes(method: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is the variant for these constants."""
    try:
        method.interface.bind(method.name, args, kwargs)
    except dw.InputError:
        return False
    return True


def run_both(
    method: Any, program: Any, module: nn.Module, eager: nn.Module, args: Any, kwargs: Any, kind: str
) -> None:
    """Call a method of the program, and the module that it comes from; then states are equal too."""
    with torch.no_grad():
        want = module(*args, **kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: as_kind(tensor, kind), (args, kwargs))
    assert_same(method(*args, **kwargs), want, kind)
    for name in program.state:
        assert_same(program.state[name], eager.get_buffer(name), "numpy")


def as_kind(tensor: Tensor, kind: str) -> Any:
    if kind == "strided":
        return tensor.mT.contiguous().mT
    return tensor.numpy() if kind == "numpy" else tensor


def assert_same(got: Any, want: Any, kind: str) -> None:
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    assert got_spec == want_spec
    for a, b in zip(got_leaves, want_leaves, strict=True):
        if not isinstance(b, Tensor):
            assert (type(a), a) == (type(b), b)
            continue
        assert isinstance(a, np.ndarray if kind == "numpy" else Tensor)
        a = torch.as_tensor(a)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        off = (a.double() - b.double()).abs() / b.double().abs().clamp(min=1)
        assert float(off.max()) <= TOLERANCE, f"differs by {float(off.max()):.3g}: {a} is not {b}"
