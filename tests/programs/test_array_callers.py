"""Callers in a process of their own, without torch: one with NumPy alone, one with JAX."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest


def run_python(code, *args):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NUMPY_ALONE = """
import json, sys
import numpy as np
import doubleweave
program = doubleweave.open(sys.argv[1])
args = (np.ones(3, "f4"), np.ones((3, 2), "f2"), np.zeros(3, "u2"), np.arange(3), np.ones(3, "?"))
found = program(*args)
found = program.submit(*args, out=list(found.values())).result()
program.session()(*args)
print(json.dumps({
    "kinds": sorted({type(value).__name__ for value in found.values()}),
    "number": found["number"].tolist(),
    "imported": sorted({"torch", "jax", "executorch", "ml_dtypes"} & set(sys.modules)),
}))
"""


def test_a_numpy_caller_never_imports_torch(dtypes_dir):
    found = run_python(NUMPY_ALONE, dtypes_dir)
    assert found == {"kinds": ["ndarray"], "number": [-1, 0, 1], "imported": []}


# In a process of its own: once JAX has run, forking (as lowering does) warns of its threads.
JAX = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
import doubleweave
from doubleweave.runtime.module import arrays
from doubleweave.runtime.module.runner import Runner

jax.config.update("jax_enable_x64", True)
program = doubleweave.open(sys.argv[1])
seen = []
run = Runner.run

def spy(self, prepared, inputs, outputs, *rest, **named):
    seen.append(list(inputs))
    return run(self, prepared, inputs, outputs, *rest, **named)

Runner.run = spy

def arguments(rows):
    return (
        jnp.linspace(-1, 1, rows, dtype=jnp.float32),
        jnp.ones((rows, 2), jnp.float16),
        jnp.arange(rows).astype(jnp.bfloat16),
        jnp.arange(rows) * 2**40,
        jnp.arange(rows) % 2 == 0,
    )

def wanted(x, half, brain, number, mask):
    return {
        "x": jnp.where(mask, x, 2 * x)[:, None] + jnp.arange(3, dtype=jnp.float32),
        "half": half * 2, "brain": brain + 1, "number": number - 1, "mask": ~mask,
    }

def is_right(found, args):
    want = wanted(*args)
    return all(
        isinstance(found[n], jax.Array) and found[n].dtype == want[n].dtype and bool((found[n] == want[n]).all())
        for n in want
    )

def refused(call):
    try:
        call()
    except doubleweave.InputError as error:
        return str(error)

result = {"version": jax.__version__}
args = arguments(5)
found = program(*args)
result["right"] = is_right(found, args)
result["not copied"] = all(a is b for a, b in zip(seen[-1], args))
kept = {name: np.array(value) for name, value in found.items()}
program(*arguments(5)[:3], args[3] + 7, ~args[4])
result["kept"] = all(np.array_equal(kept[n], found[n]) for n in kept)
result["sizes"] = all(is_right(program(*arguments(rows)), arguments(rows)) for rows in (1, 64, 3))
result["submitted"] = is_right(program.submit(*args).result(), args)

# Half as it comes out of a transpose, whatever its layout is.
turned = (args[0], jnp.arange(10, dtype=jnp.float16).reshape(2, 5).T, *args[2:])
result["transposed"] = is_right(program(*turned), turned)

# Not computed yet when the call begins.
slow = jax.jit(lambda x, m: x + jax.lax.fori_loop(0, 60, lambda i, m: jnp.sin(m @ m), m)[0, 0])
matrix = jnp.eye(500, dtype=jnp.float32)
slow(args[0], matrix).block_until_ready()
late = slow(args[0] + 1, matrix)
result["late"] = is_right(program(late, *args[1:]), (late, *args[1:]))

out = [np.zeros((5, 3), "f4"), np.zeros((5, 2), "f2"), np.zeros(5, "u2"), np.zeros(5, "i8"), np.zeros(5, "?")]
found = program(*args, out=out)
result["into NumPy"] = all(
    type(value) is np.ndarray and value.ctypes.data == given.ctypes.data
    for value, given in zip(found.values(), out)
) and bool((out[3] == np.asarray(args[3]) - 1).all())
result["out"] = refused(lambda: program(*args, out=[args[0], *out[1:]]))
result["dtype"] = refused(lambda: program(args[0].astype(jnp.float64), *args[1:]))
result["torch"] = "torch" in sys.modules
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def jax_calls(dtypes_dir):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed; it is optional")
    return run_python(JAX, dtypes_dir)


@pytest.mark.parametrize(
    "what",
    ["right", "not copied", "kept", "sizes", "submitted", "transposed", "late", "into NumPy"],
)
def test_jax(jax_calls, what):
    assert jax_calls[what] is True


def test_jax_arrays_are_refused_as_out(jax_calls):
    assert jax_calls["out"] == (
        "Dtypes, out: found a ArrayImpl, expected contiguous, writable float32 with room for [5, 3]: "
        "a NumPy array or a torch tensor"
    )


def test_jax_arrays_of_another_dtype_are_refused(jax_calls):
    assert jax_calls["dtype"] == "Dtypes, x: found dtype float64, expected float32"


def test_a_jax_caller_never_imports_torch(jax_calls):
    assert jax_calls["torch"] is False
