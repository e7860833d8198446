"""Tensors of torch and NumPy: results in the caller's kind, and no copy where none is needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import doubleweave
from doubleweave.errors import InputError
from doubleweave.runtime.module import arrays
from doubleweave.runtime.module.runner import Runner

MOST = 64  # rows that the program takes


@pytest.fixture(scope="module")
def program(dtypes_dir):
    return doubleweave.open(dtypes_dir)


NAMES = ("x", "half", "brain", "number", "mask")


def torch_arguments(rows, seed=0):
    import torch

    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, generator=random),
        torch.randn(rows, 2, generator=random).half(),
        torch.randn(rows, generator=random).bfloat16(),
        torch.randint(-(2**40), 2**40, (rows,), generator=random),
        torch.rand(rows, generator=random) > 0.5,
    )


def numpy_arguments(rows, seed=0):
    """The same numbers; bfloat16 as its bits, NumPy has none of its own."""
    import torch

    return tuple(
        (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy()
        for t in torch_arguments(rows, seed)
    )


def expected(args):
    """What the module computes, by name, as torch tensors."""
    import torch

    x, half, brain, number, mask = args
    return {
        "x": torch.where(mask, x, 2 * x).unsqueeze(1) + torch.arange(3),
        "half": half * 2,
        "brain": brain + 1,
        "number": number - 1,
        "mask": ~mask,
    }


def torch_outputs(rows):
    import torch

    return [torch.zeros_like(value) for value in expected(torch_arguments(rows)).values()]


def numpy_outputs(rows):
    import torch

    found = torch_outputs(rows)
    return [(t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy() for t in found]


def check_torch(found, args):
    import torch

    for name, want in expected(args).items():
        assert type(found[name]) is torch.Tensor
        assert found[name].dtype == want.dtype
        assert torch.equal(found[name], want), name


def check_numpy(found, args):
    import torch

    for name, want in expected(args).items():
        assert type(found[name]) is np.ndarray
        wanted = (want.view(torch.uint16) if want.dtype is torch.bfloat16 else want).numpy()
        assert found[name].dtype == wanted.dtype
        assert np.array_equal(found[name], wanted), name


@pytest.fixture
def handed_over(monkeypatch):
    """The inputs and outputs that each run was given, to compare their addresses with the caller's."""
    seen = []
    run = Runner.run

    def spy(self, prepared, inputs, outputs, *rest, **named):
        seen.append((list(inputs), list(outputs)))
        return run(self, prepared, inputs, outputs, *rest, **named)

    monkeypatch.setattr(Runner, "run", spy)
    return seen


def addresses(values):
    return [arrays.address_range(value)[0] for value in values]


def test_torch_in_torch_out_without_a_copy(program, handed_over):
    args = torch_arguments(7)
    found = program(*args)
    check_torch(found, args)
    ((inputs, outputs),) = handed_over
    assert addresses(inputs) == [tensor.data_ptr() for tensor in args]
    assert addresses(outputs) == [found[name].data_ptr() for name in NAMES]


def test_numpy_in_numpy_out_without_a_copy(program, handed_over):
    args = numpy_arguments(7)
    found = program(*args)
    check_numpy(found, torch_arguments(7))
    ((inputs, outputs),) = handed_over
    assert addresses(inputs) == [array.ctypes.data for array in args]
    assert addresses(outputs) == [found[name].ctypes.data for name in NAMES]


def test_the_first_tensor_says_which_kind_the_results_are(program):
    import torch

    both = list(zip(torch_arguments(3), numpy_arguments(3), strict=True))
    found = program(*(pair[i > 0] for i, pair in enumerate(both)))
    assert {type(value) for value in found.values()} == {torch.Tensor}
    check_torch(found, torch_arguments(3))
    found = program(*(pair[i == 0] for i, pair in enumerate(both)))
    assert {type(value) for value in found.values()} == {np.ndarray}
    check_numpy(found, torch_arguments(3))


def test_results_do_not_share_memory_with_arguments_or_each_other(program):
    args = numpy_arguments(4)
    first, second = program(*args), program(*args)
    every = [*args, *first.values(), *second.values()]
    spans = sorted(arrays.address_range(array) for array in every)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("make", [torch_outputs, numpy_outputs], ids=["torch", "numpy"])
def test_small_large_small_into_the_same_tensors(program, handed_over, make):
    out = make(MOST)
    where = addresses(out)
    is_torch = make is torch_outputs
    for rows in (3, MOST, 3, 1, 40, MOST):
        args = torch_arguments(rows, seed=rows)
        found = program(*(args if is_torch else numpy_arguments(rows, seed=rows)), out=out)
        (check_torch if is_torch else check_numpy)(found, args)
        assert addresses(found.values()) == where
        assert addresses(handed_over[-1][1]) == where


def test_results_of_one_kind_into_tensors_of_another(program):
    args = torch_arguments(5)
    out = numpy_outputs(5)
    found = program(*args, out=out)
    check_numpy(found, args)
    assert addresses(found.values()) == addresses(out)
    check_torch(program(*numpy_arguments(5), out=torch_outputs(5)), args)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.repeat_interleave(2, 0)[::2],
        lambda t: t.flip(0).flip(0),
        lambda t: t.unsqueeze(0).expand(3, *t.shape)[1],
        lambda t: t.T.contiguous().T if t.ndim == 2 else t,
    ],
    ids=["strided", "flipped", "expanded", "transposed"],
)
def test_torch_tensors_of_any_layout_are_read_right(program, change):
    args = torch_arguments(6)
    changed = [change(tensor) for tensor in args]
    check_torch(program(*changed), args)
    assert all(map(np.array_equal, (c.float() for c in changed), (a.float() for a in args)))  # unchanged


@pytest.mark.parametrize(
    "change",
    [
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: np.asfortranarray(a),
        lambda a: np.stack([a, a], axis=-1)[..., 1],
    ],
    ids=["strided", "reversed", "fortran", "interleaved"],
)
def test_numpy_arrays_of_any_layout_are_read_right(program, handed_over, change):
    args = numpy_arguments(6)
    changed = [change(array) for array in args]
    assert not all(array.flags.c_contiguous for array in changed)
    check_numpy(program(*changed), torch_arguments(6))
    for array, given in zip(changed, handed_over[0][0], strict=True):
        assert (arrays.address_range(given)[0] == array.ctypes.data) == array.flags.c_contiguous


def test_read_only_arrays_are_read_where_they_are(program, handed_over):
    args = numpy_arguments(6)
    for array in args:
        array.flags.writeable = False
    check_numpy(program(*args), torch_arguments(6))
    assert addresses(handed_over[0][0]) == [array.ctypes.data for array in args]


def test_tensors_that_require_grad_are_read_where_they_are(program, handed_over):
    import torch

    args = torch_arguments(6)
    wanted = [args[0].clone().requires_grad_(), torch.nn.Parameter(args[1]), *args[2:]]
    found = program(*wanted)
    check_torch(found, args)
    assert not any(value.requires_grad for value in found.values())
    assert addresses(handed_over[0][0]) == [tensor.data_ptr() for tensor in wanted]
    # Nor does it matter what is made of them.
    check_torch(program(wanted[0] * 1, wanted[1] * 1, *args[2:]), args)


def test_other_tensors_are_taken_through_dlpack(program):
    class Other:
        def __init__(self, tensor):
            self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    args = torch_arguments(6)
    check_numpy(program(*map(Other, args)), args)
    strided = [arg.repeat_interleave(2, 0)[::2] for arg in args]
    assert not strided[0].is_contiguous()
    check_numpy(program(*map(Other, [*strided[:2], args[2], *strided[3:]])), args)
    with pytest.raises(
        InputError, match="brain: found a tensor that cannot be read in place"
    ):  # NumPy cannot copy it
        program(*map(Other, strided))


def test_bfloat16_of_another_library_is_read_where_it_is(program, handed_over):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="comes with JAX")
    args = list(numpy_arguments(6))
    args[2] = args[2].view(ml_dtypes.bfloat16)
    check_numpy(program(*args), torch_arguments(6))
    assert addresses(handed_over[0][0]) == [array.ctypes.data for array in args]


def nested(tensor):
    import torch

    return torch.nested.nested_tensor(list(tensor))


def negated(tensor):
    import torch

    return torch._neg_view(tensor)


def change_one(values, index, value):
    return [value if i == index else given for i, given in enumerate(values)]


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda t: t.double(), "Dtypes, x: found dtype float64, expected float32"),
        (1, lambda t: t.bfloat16(), "half: found dtype bfloat16, expected float16"),
        (2, lambda t: t.half(), "brain: found dtype float16, expected bfloat16"),
        (3, lambda t: t.int(), "number: found dtype int32, expected int64"),
        (4, lambda t: t.byte(), "mask: found dtype uint8, expected bool"),
        (0, lambda t: t.to("meta"), r"x: found a tensor on meta, expected one on the CPU; call \.cpu\(\)"),
        (0, lambda t: t.tolist(), "x: found a list of 4, expected a tensor"),
        (3, lambda t: 5, "number: found 5, expected a tensor"),
        (0, lambda t: memoryview(t.numpy()), "x: found a memoryview, expected a tensor"),
        (0, lambda t: np.ndarray, "x: found a type, expected a tensor"),
        (0, nested, "x: found a nested tensor, expected a dense one"),
    ],
)
def test_other_dtypes_devices_and_things_are_refused(program, index, change, message):
    args = torch_arguments(4)
    with pytest.raises(InputError, match=message):
        program(*change_one(args, index, change(args[index])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out[:-1], "Dtypes, out: found 4 tensors, expected 5"),
        (lambda out: [*out, out[0].clone()], "out: found 6 tensors, expected 5"),
        (lambda out: out[0], "out: found 1 tensors, expected 5"),
        (
            lambda out: [out[0].double(), *out[1:]],
            "out: found float64.*expected contiguous, writable float32",
        ),
        (lambda out: [out[0].int(), *out[1:]], "out: found int32"),
        (lambda out: [out[0], out[1].bfloat16(), *out[2:]], "out: found bfloat16.*writable float16"),
        (lambda out: [out[0].flatten()[:11], *out[1:]], r"found float32\[11\], .* with room for \[4, 3\]"),
        (lambda out: [out[0].T, *out[1:]], "expected contiguous, writable float32"),
        (lambda out: [out[0][:1].expand(4, 3), *out[1:]], "expected contiguous, writable float32"),
        (lambda out: [out[0].requires_grad_(), *out[1:]], "expected contiguous, writable float32"),
        (lambda out: [negated(out[0]), *out[1:]], "expected contiguous, writable float32"),
        (lambda out: [out[0].to("meta"), *out[1:]], "expected contiguous, writable float32"),
        (lambda out: [None, *out[1:]], "out: found a NoneType, .*a NumPy array or a torch tensor"),
        (lambda out: [out[0].tolist(), *out[1:]], "out: found a list"),
        (lambda out: [memoryview(out[0].numpy()), *out[1:]], "out: found a memoryview"),
    ],
)
def test_out_that_cannot_be_written_to_is_refused(program, change, message):
    with pytest.raises(InputError, match=message):
        program(*torch_arguments(4), out=change(torch_outputs(4)))


def test_read_only_and_strided_arrays_are_refused_as_out(program):
    for change in (lambda a: a.setflags(write=False) or a, lambda a: np.repeat(a, 2, 1)[:, ::2]):
        out = numpy_outputs(4)
        out[0] = change(out[0])
        with pytest.raises(
            InputError, match=r"out: found float32\[4, 3\], expected contiguous, writable float32"
        ):
            program(*numpy_arguments(4), out=out)


def test_out_over_an_argument_or_another_result_is_refused(program):
    import torch

    memory = torch.zeros(100)
    args = [memory[20:24], *torch_arguments(4)[1:]]
    message = "out: the memory for .* is also that of x; give it memory of its own"
    for start in (9, 20, 23):
        with pytest.raises(InputError, match=message):
            program(*args, out=[memory[start : start + 12], *torch_outputs(4)[1:]])
    # Beside it is fine.
    for start in (8, 24):
        found = program(*args, out=[memory[start : start + 12], *torch_outputs(4)[1:]])
        assert torch.equal(found["x"], expected(args)["x"])
    out = torch_outputs(4)
    with pytest.raises(
        InputError, match=r"out: the memory for .* is also that of .*; give it memory of its own"
    ):
        program(*args, out=[out[0], out[1], out[0].view(torch.bfloat16).view(-1)[:4], *out[3:]])


def test_an_argument_that_must_be_copied_may_lie_under_out(program):
    # The copy is made before anything is written.
    memory = np.ones((12, 2), np.float32)
    args = [memory[:4, 0], *numpy_arguments(4)[1:]]
    wanted = program(args[0].copy(), *args[1:])
    found = program(*args, out=[memory.reshape(-1)[:12], *numpy_outputs(4)[1:]])
    assert np.array_equal(found["x"], wanted["x"])


def test_refused_calls_write_nothing(program):
    out = torch_outputs(4)
    with pytest.raises(InputError):
        program(*change_one(torch_arguments(4), 3, torch_arguments(5)[3]), out=out)
    assert not any(tensor.any() for tensor in out)


def test_what_can_be_read_is_not_copied():
    import torch

    array = np.arange(6.0).reshape(2, 3)
    assert arrays.readable(array, "x").ctypes.data == array.ctypes.data
    assert arrays.readable(array.T, "x").flags.c_contiguous
    assert arrays.readable(array.T, "x").ctypes.data != array.ctypes.data
    scalar = np.array(3.0)
    assert arrays.readable(scalar, "x").shape == ()
    assert arrays.readable(scalar, "x").ctypes.data == scalar.ctypes.data
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert arrays.readable(tensor, "x").data_ptr() == tensor.data_ptr()
    assert arrays.readable(tensor.T, "x").is_contiguous()


def test_out_is_the_beginning_of_what_was_given():
    array = np.zeros((5, 7), np.float32)
    for shape in ((2, 3), (35,), (), (1, 1, 1), (0, 4)):
        found = arrays.writable(array, shape, "float32", "out")
        assert found.shape == shape
        assert found.ctypes.data == array.ctypes.data
        assert np.may_share_memory(found, array) or not found.size
    with pytest.raises(InputError, match=r"with room for \[6, 6\]"):
        arrays.writable(array, (6, 6), "float32", "out")


@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.repeat_interleave(2, 0)[::2]])
def test_subclasses_of_torch_tensors_are_torch_tensors(program, change):
    import torch

    class Marked(torch.Tensor):
        pass

    args = torch_arguments(4)
    found = program(*(change(tensor).as_subclass(Marked) for tensor in args))
    assert all(isinstance(value, torch.Tensor) for value in found.values())
    assert all(torch.equal(found[name], want) for name, want in expected(args).items())


def test_another_byte_order_is_refused_as_any_other_dtype(program):
    args = numpy_arguments(4)
    with pytest.raises(InputError, match="x: found dtype"):
        program(args[0].astype(">f4"), *args[1:])


def test_tensors_with_a_pending_negation_are_read_right(program):
    import torch

    args = torch_arguments(1)
    lazy = torch.conj(torch.complex(torch.zeros(1), args[0])).imag
    assert lazy.is_neg()
    args = (-args[0], *args[1:])
    assert torch.equal(lazy, args[0])
    check_torch(program(lazy, *args[1:]), args)
