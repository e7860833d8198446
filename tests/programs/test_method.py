"""Each compiled method called by hand: shapes, buffers of the caller, and refusals."""

from __future__ import annotations

import numpy as np
import pytest

import toys
from doubleweave.errors import InputError
from doubleweave.ir.split import rows

BLOCK = "block_1"  # reads attention's output and the residual, writes q, k, v and the residual


def sizes_of(port, rows, cached):
    return [rows if size == "T" else cached if size == "S" else size for size in port.shape]


def arguments(method, rows, cached=None, seed=0):
    random = np.random.default_rng(seed)
    made = []
    for port in method.function.inputs:
        sizes = sizes_of(port, rows, cached or rows)
        if port.dtype == "int64":
            made.append(random.integers(0, toys.VOCAB_SIZE, sizes))
        else:
            made.append(random.standard_normal(sizes).astype(port.dtype))
    return made


def outputs(method, rows):
    return [
        np.full(sizes_of(p, rows, rows), np.nan, p.dtype)
        for p in map(method.function.value, method.function.outputs)
    ]


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.fixture(scope="module")
def eager(toy_program):
    """The same segments in eager torch, by name."""
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.split.split_llm import default_policy, split_llm

    module = toys.module()
    return split_llm(
        export_llm(module, 32),
        owned_modules(module),
        policy=default_policy(rows(1, 32)),
        max_context=toys.MAX_CONTEXT,
    )


def test_every_segment_runs_alone_as_in_eager_torch(toy_program, eager):
    import torch

    assert set(toy_program.methods) == {segment.name for segment in eager.split.segments}
    for name, method in toy_program.methods.items():
        args = arguments(method, rows=7, cached=20)
        wanted = eager.module(name)(*map(torch.from_numpy, args))
        found = as_tuple(method(*args))
        assert len(found) == len(wanted)
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, want.detach().numpy(), rtol=2e-5, atol=2e-5, err_msg=name)


def test_fixed_sizes_are_methods_of_their_own(toy_static_program, toy_program):
    methods = toy_static_program.methods
    assert {f"{BLOCK}@1", f"{BLOCK}@8", f"{BLOCK}@32", "attention", "lm_head@1"} <= set(methods)
    assert BLOCK not in methods
    for size in (1, 8, 32):
        args = arguments(methods[f"{BLOCK}@{size}"], size)
        for got, want in zip(
            methods[f"{BLOCK}@{size}"](*args), toy_program.methods[BLOCK](*args), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"block_1@8, in0: found shape \[1, 7, 64\], expected \[1, 8, 64\]"):
        methods[f"{BLOCK}@8"](*[array[:, :7] for array in arguments(methods[f"{BLOCK}@8"], 8)])


def test_small_large_small_into_the_same_buffers(toy_program):
    method = toy_program.methods[BLOCK]
    alone = {rows: [a.copy() for a in method(*arguments(method, rows))] for rows in (3, 32, 1)}
    out = outputs(method, 32)
    for count in (3, 32, 3, 1, 32):
        result = method(*arguments(method, count), out=out)
        for got, want, given in zip(result, alone[count], out, strict=True):
            assert got.shape == want.shape
            assert np.array_equal(got, want)
            assert got.ctypes.data == given.ctypes.data


def test_out_is_written_in_place(toy_program):
    method = toy_program.methods["lm_head"]
    (out,) = outputs(method, 5)
    address = out.ctypes.data
    result = method(*arguments(method, 5), out=out)
    assert result.ctypes.data == out.ctypes.data == address
    assert np.array_equal(result, method(*arguments(method, 5)))
    assert not np.isnan(out).any()


def test_results_belong_to_the_caller(toy_program):
    method = toy_program.methods[BLOCK]
    first = method(*arguments(method, 4))
    copies = [array.copy() for array in first]
    method(*arguments(method, 4, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(first, copies, strict=True))


def test_arrays_that_are_not_contiguous_are_read_right(toy_program):
    method = toy_program.methods["lm_head"]
    (x,) = arguments(method, 6)
    strided = np.repeat(x, 2, axis=1)[:, ::2]
    assert not strided.flags.c_contiguous
    assert np.array_equal(method(strided), method(x))


def test_attention_alone_sees_the_whole_cache(toy_program):
    method = toy_program.methods["attention"]
    q, k, v = arguments(method, 2, 50)
    before = method(q, k, v)
    v[:, 0] += 100.0  # the oldest token
    assert np.abs(method(q, k, v) - before).max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, *rest: (x,), "block_1: missing a required argument: 'in1'; expected block_1"),
        (lambda x, y, *rest: (x, y, *rest, x), "block_1: too many positional arguments; expected block_1"),
        (lambda x, y, *rest: (x.astype("f8"), y, *rest), "in0: found dtype float64, expected float32"),
        (lambda x, y, *rest: (x, y.astype("i8"), *rest), "in1: found dtype int64, expected float32"),
        (lambda x, y, *rest: (x[0], y, *rest), r"in0: found shape \[4, 64\], expected \[1, T, 64\]"),
        (lambda x, y, *rest: (x[..., :63], y, *rest), r"found shape \[1, 4, 63\], expected \[1, T, 64\]"),
        (
            lambda x, y, *rest: (np.repeat(x, 2, 0), y, *rest),
            r"found shape \[2, 4, 64\], expected \[1, T, 64\]",
        ),
        (
            lambda x, y, *rest: (x, y[:, :3], *rest),
            r"found shape \[1, 3, 64\].*where T = 4 from what came before",
        ),
        (lambda *all: [x[:, :0] for x in all], r"with T in 1\.\.32: T is 0"),
        (lambda *all: [np.repeat(x, 9, 1) for x in all], r"with T in 1\.\.32: T is 36"),
    ],
)
def test_wrong_inputs_are_refused_with_what_is_allowed(toy_program, change, message):
    method = toy_program.methods[BLOCK]
    with pytest.raises(InputError, match=message):
        method(*change(*arguments(method, 4)))


def test_cache_range_is_checked(toy_program):
    method = toy_program.methods["attention"]
    for cached in (3, toys.MAX_CONTEXT + 1):
        with pytest.raises(InputError, match=rf"S in T\.\.{toys.MAX_CONTEXT}: S is {cached}"):
            method(*arguments(method, 4, cached))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:-1], "out: found 3 tensors, expected 4"),
        (
            lambda out: [out[0].astype(np.float64), *out[1:]],
            r"out: found float64\[1, 4, 64\], expected contiguous, writable float32",
        ),
        (lambda out: [out[0][:, :3], *out[1:]], r"with room for \[1, 4, 64\]"),
        (lambda out: [np.repeat(out[0], 2, 2)[..., ::2], *out[1:]], "expected contiguous, writable float32"),
    ],
)
def test_wrong_out_is_refused(toy_program, change, message):
    method = toy_program.methods[BLOCK]
    with pytest.raises(InputError, match=message):
        method(*arguments(method, 4), out=change(outputs(method, 4)))


def test_read_only_out_is_refused(toy_program):
    method = toy_program.methods["lm_head"]
    (out,) = outputs(method, 4)
    out.flags.writeable = False
    with pytest.raises(InputError, match="expected contiguous, writable float32"):
        method(*arguments(method, 4), out=out)


def test_token_ids_beyond_the_vocabulary_do_not_read_foreign_memory(toy_program):
    from doubleweave.errors import DoubleweaveError

    method = toy_program.methods["embed_tokens"]
    for token in (-1, toys.VOCAB_SIZE, 2**40):
        with pytest.raises(DoubleweaveError):
            method(np.array([[token]]))
    assert np.isfinite(method(np.array([[toys.VOCAB_SIZE - 1]]))).all()


def test_repr_shows_ports_and_range(toy_program, toy_static_program):
    assert repr(toy_program.methods["lm_head"]) == (
        f"<method lm_head(in0: float32[1, T, {toys.HIDDEN}]) -> float32[1, T, {toys.VOCAB_SIZE}], T in 1..32>"
    )
    assert f"[1, 8, {toys.HIDDEN}]" in repr(toy_static_program.methods[f"{BLOCK}@8"])
