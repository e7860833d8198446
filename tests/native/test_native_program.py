"""Programs and instances of the native module, on small real methods. Knows nothing of schedules."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch

from doubleweave import _native
from native_toys import H, expected, lower, rows_of, run, toy_modules


def test_method_names_and_infos(program, toy_path):
    assert program.path == str(toy_path)
    assert {"mlp", "int8", "attention", "fixed"} <= set(program.method_names)
    (info,) = program.load("mlp").inputs
    assert (info.dtype, info.sizes, info.is_dynamic, info.nbytes) == (
        "float32",
        (1, 128, H),
        True,
        128 * H * 4,
    )
    assert not program.load("fixed").inputs[0].is_dynamic


@pytest.mark.parametrize("sizes", [[1, 128, 1], [37, 128, 37, 2, 2]])
@pytest.mark.parametrize("name", ["mlp", "int8"])
def test_any_row_count_in_any_order(program, name, sizes):
    instance = program.load(name)
    for num_rows in sizes:
        x = rows_of(num_rows)
        np.testing.assert_allclose(run(instance, x), expected(toy_modules()[name], x), rtol=1e-4, atol=2e-3)


def test_outputs_are_written_in_place(program):
    instance = program.load("mlp")
    x = rows_of(3)
    out = np.zeros((1, 5, H), np.float32)
    instance.bind_input(0, x.ctypes.data, [1, 3, H])
    instance.bind_output(0, out.ctypes.data, 3 * H * 4, [1, 3, H])
    instance.execute()
    np.testing.assert_allclose(out[:, :3], expected(toy_modules()["mlp"], x), rtol=1e-4, atol=1e-5)
    assert (out[:, 3:] == 0).all()
    x[:] = rows_of(3, seed=1)  # what is bound is read anew at each run
    instance.execute()
    np.testing.assert_allclose(out[:, :3], expected(toy_modules()["mlp"], x), rtol=1e-4, atol=1e-5)


def test_unknown_output_sizes_need_room_for_the_upper_bound(program):
    instance = program.load("mlp")
    x = rows_of(3)
    out = np.zeros((1, 128, H), np.float32)
    with pytest.raises(
        _native.Error, match=r"output 0 needs 32768 bytes .*upper bound.*, but 768 were bound"
    ):
        instance.bind_output(0, out.ctypes.data, 3 * H * 4)
    instance.bind_input(0, x.ctypes.data, x.shape)
    instance.bind_output(0, out.ctypes.data, out.nbytes)
    instance.execute()
    assert instance.output_sizes(0) == (1, 3, H)


def test_a_result_larger_than_bound_is_refused_not_overrun(program):
    instance = program.load("mlp")
    x = rows_of(100)
    out = np.zeros((1, 128, H), np.float32)
    instance.bind_input(0, x.ctypes.data, x.shape)
    instance.bind_output(0, out.ctypes.data, 4 * H * 4, [1, 4, H])
    with pytest.raises(_native.Error, match="method 'mlp' failed"):
        instance.execute()
    assert (out == 0).all()
    np.testing.assert_array_equal(run(instance, x), run(program.load("mlp"), x))  # and it still works


def test_a_result_smaller_than_bound_is_an_error(program):
    instance = program.load("mlp")
    with pytest.raises(
        _native.Error, match=r"came out with sizes \[1, 3, 64\], but was bound with \[1, 4, 64\]"
    ):
        instance.run([rows_of(3)], [np.empty((1, 4, H), np.float32)])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((1, 3, H), np.float64), TypeError, "input 0 has dtype float64, expected float32"),
        (np.zeros((1, 129, H), np.float32), RuntimeError, r"sizes \[1, 129, 64\], expected .*\[1, 128, 64\]"),
        (np.zeros((1, 0, H), np.float32), RuntimeError, "at least 1"),
        (np.zeros((3, H), np.float32), RuntimeError, r"sizes \[3, 64\]"),
        (np.zeros((1, 3, 2 * H), np.float32)[:, :, ::2], TypeError, "C-contiguous"),
        ([1.0], TypeError, "input 0 must be a C-contiguous array, but is a list"),
        (np.zeros((1, 3, H), np.complex64), TypeError, "input 0 has elements of format 'Zf'"),
        (np.zeros((1, 3, H), ">f4"), TypeError, "input 0 has elements of format '>f'"),
    ],
)
def test_wrong_inputs(program, x, error, message):
    with pytest.raises(error, match=message):
        program.load("mlp").run([x], [np.zeros((1, 3, H), np.float32)])


def test_wrong_calls(program):
    instance = program.load("fixed")
    x = np.zeros((1, 8, H), np.float32)
    frozen = np.zeros((1, 8, H), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(_native.Error, match=r"expected \[1, 8, 64\]"):
        instance.run([x[:, :4].copy()], [x])
    with pytest.raises(_native.Error, match="takes 1 inputs and gives 1 outputs, but 2 and 1"):
        instance.run([x, x], [x])
    with pytest.raises(TypeError, match="writable"):
        instance.run([x], [frozen])
    with pytest.raises(_native.Error, match="input 0 is not bound"):
        program.load("fixed").execute()
    with pytest.raises(_native.Error, match="null pointer"):
        instance.bind_input(0, 0, [1, 8, H])
    with pytest.raises(_native.Error, match="has 1 inputs, but input 7 was named"):
        instance.bind_input(7, x.ctypes.data, [1, 8, H])
    with pytest.raises(_native.Error, match=r"no method 'nope'; it has .*mlp"):
        program.load("nope")


def test_threads_of_one_call(program):
    instance, x = program.load("mlp"), rows_of(128)
    want, out, most = run(instance, x), np.empty_like(x), _native.max_threads()
    for threads, after in ((0, 1), (most, most), (0, most), (1, 1)):
        assert instance.run([x], [out], threads=threads) == [x.shape]
        np.testing.assert_array_equal(out, want)
        assert _native.intra_op_threads() == after
    for wrong in (-1, most + 1):
        with pytest.raises(_native.Error, match=f"between 1 and {most} on this machine, but was {wrong}"):
            instance.run([x], [out], wrong)
    if most > 2:
        with pytest.raises(
            _native.Error, match=f"must be 1 or {most}, the size of the thread pool, but was 2"
        ):
            instance.run([x], [out], 2)


def test_inputs_passed_through_are_copied_out(program):
    x, y = np.arange(16, dtype=np.float32), np.ones(16, np.float32)
    outs = [np.empty(16, np.float32), np.empty((2, 8), np.float32), np.empty(16, np.float32)]
    instance = program.load("passing")
    for _ in range(2):
        instance.run([x, y], outs)
        np.testing.assert_array_equal(outs[0], x)
        np.testing.assert_array_equal(outs[1], y.reshape(2, 8))
        np.testing.assert_array_equal(outs[2], x + y)
        y += 1


def test_planned_inputs_and_outputs_work_too(tmp_path):
    exported = torch.export.export(toy_modules()["mlp"], (torch.randn(1, 8, H),), strict=False)
    program = _native.Program(str(lower({"forward": exported}, tmp_path / "p.pte", unplanned=False)))
    x = rows_of(8)
    np.testing.assert_allclose(
        run(program.load("forward"), x), expected(toy_modules()["mlp"], x), rtol=1e-4, atol=1e-5
    )


def test_a_failing_kernel_is_an_error(program):
    instance = program.load("matmul")
    with pytest.raises(_native.Error, match="method 'matmul' failed"):
        instance.run(
            [np.ones((3, 4), np.float32), np.ones((6, 5), np.float32)], [np.empty((3, 5), np.float32)]
        )
    out = np.empty((3, 5), np.float32)
    instance.run([np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)], [out])
    assert (out == 4).all()


def test_missing_truncated_and_foreign_files(toy_path, tmp_path):
    whole = toy_path.read_bytes()
    cases = {
        "empty": (b"", "too few for an ExecuTorch program"),
        "short": (whole[:40], "too few for an ExecuTorch program"),
        "half": (whole[: len(whole) // 2], "is damaged or truncated"),
        "head": (whole[:4096], "is damaged or truncated"),
        "text": (b"hello " * 100, "does not start like an ExecuTorch program"),
        "zeros": (whole[:64] + bytes(len(whole) - 64), "is damaged or truncated"),
    }
    for name, (data, message) in cases.items():
        file = tmp_path / name
        file.write_bytes(data)
        with pytest.raises(_native.Error, match=message) as caught:
            _native.Program(str(file))
        assert str(file) in str(caught.value)
    for wrong in (tmp_path, tmp_path / "missing.pte"):
        with pytest.raises(_native.Error, match="is not a file"):
            _native.Program(str(wrong))


def test_a_backend_that_this_build_lacks_is_named(toy_path, tmp_path):
    path = tmp_path / "other.pte"
    path.write_bytes(toy_path.read_bytes().replace(b"XnnpackBackend", b"NowhereBackend"))
    message = r"'mlp' of '.*other\.pte' is compiled for backend 'NowhereBackend', which this .* lacks; it has .*Xnnpack"
    with pytest.raises(_native.Error, match=message):
        _native.Program(str(path)).load("mlp")


def test_instances_outlive_their_program(toy_path):
    instance = _native.Program(str(toy_path)).load("mlp")
    assert run(instance, rows_of(2)).shape == (1, 2, H)


def test_running_needs_no_torch(toy_path):
    code = f"""
import sys, doubleweave._native as n, numpy as np
out = np.empty((1, 2, {H}), np.float32)
n.Program({str(toy_path)!r}).load("mlp").run([np.ones((1, 2, {H}), np.float32)], [out])
assert "torch" not in sys.modules and "executorch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# Tensors of other frameworks


class Exporting:
    """Memory of a NumPy array that only DLPack tells of."""

    def __init__(self, array: np.ndarray, **changed: object) -> None:
        self.array, self.changed = array, changed

    def __dlpack__(self, **asked: object) -> object:
        return self.array.__dlpack__(**(asked | self.changed))


class OnCuda(Exporting):
    def __dlpack__(self, **asked: object) -> object:
        capsule = super().__dlpack__(**asked)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLManagedTensorVersioned: version, context, deleter, flags and data lie before the device.
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor_versioned") + 40).value = 2
        return capsule


@pytest.mark.parametrize(
    ("method", "x", "y"),
    [
        ("add_int64", [[1, 2, 3], [4, 5, 1 << 40]], [[7, 8, 9], [-1, -2, -3]]),
        ("add_bfloat16", [[1, 2, 3], [4, 5, 6]], [[0.5, 8, 9], [-1, -2, -3]]),
        ("and_bool", [[True, True, False], [False, True, True]], [[True, False, False]] * 2),
    ],
)
def test_tensors_are_read_and_written_in_place(program, method, x, y):
    dtype = getattr(torch, method.partition("_")[2])
    x, y = (torch.tensor(rows).to(dtype) for rows in (x, y))
    out = torch.zeros(2, 3, dtype=dtype)
    start = out.data_ptr()
    assert program.load(method).run([x, y], [out]) == [(2, 3)]
    assert torch.equal(out, torch.logical_and(x, y) if method == "and_bool" else x + y)
    assert out.data_ptr() == start
    region = _native.Region.of(out)
    assert (region.address, region.nbytes) == (out.data_ptr(), out.nbytes)


def test_float_tensors_and_arrays_mix(program):
    x, out = torch.from_numpy(rows_of(3)), torch.zeros(2, 3, H)
    want = run(program.load("mlp"), x.numpy())
    program.load("mlp").run([x], [out[1:]])  # a view: DLPack's address lies inside `out`
    np.testing.assert_array_equal(out[1:].numpy(), want)
    assert not out[0].any()
    program.load("mlp").run([Exporting(x.numpy())], [Exporting(out[:1].numpy())])
    np.testing.assert_array_equal(out[:1].numpy(), want)


@pytest.mark.parametrize("wrap", [np.asarray, Exporting])
def test_regions_keep_their_arrays_alive(wrap):
    array = np.ones(3)
    alive = weakref.ref(array)
    region = _native.Region.of(wrap(array))
    assert region.address == array.ctypes.data
    del array
    assert alive() is not None
    del region
    assert alive() is None


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.zeros(1, 3, H, requires_grad=True),
            r"input 0 is a Tensor that requires grad; call .detach\(\)",
        ),
        (
            torch.zeros(1, 3, H, device="meta"),
            "input 0 is a Tensor that gives no memory through DLPack: Cannot",
        ),
        (torch.zeros(1, H, 3).mT, "input 0 must be a C-contiguous array, but is a Tensor that is not"),
        (torch.zeros(1, 3, H, dtype=torch.bfloat16), "input 0 has dtype bfloat16, expected float32"),
        (torch.zeros(1, 3, H, dtype=torch.complex64), "input 0 has elements of DLPack's type code 5 with 64"),
        (
            OnCuda(np.zeros((1, 3, H), "f")),
            r"input 0 is a OnCuda on another device \(DLPack's 2\), expected the CPU",
        ),
    ],
)
def test_tensors_that_are_refused(program, x, message):
    with pytest.raises(TypeError, match=message):
        program.load("mlp").run([x], [np.zeros((1, 3, H), np.float32)])


def test_outputs_must_be_known_to_be_writable(program):
    x, out = rows_of(3), np.zeros((1, 3, H), np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    # Before version 1.0 DLPack did not say whether memory may be written; JAX's may not.
    for wrong in (Exporting(frozen), Exporting(out, max_version=None)):
        program.load("mlp").run([wrong], [np.empty_like(out)])
        with pytest.raises(
            TypeError, match="output 0 must be a C-contiguous, writable array, but is a Exporting"
        ):
            program.load("mlp").run([x], [wrong])
    assert not out.any()
