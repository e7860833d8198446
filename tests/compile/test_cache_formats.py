"""Caches in fewer bits than float32: what appends to the cache writes the format, and attention reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import doubleweave as dw
import toys
from doubleweave.compiler.backends import backends
from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.graph.cache_rows import as_float, empty_rows, stored
from doubleweave.compiler.pipeline_llm import splits_of
from doubleweave.compiler.split.eager import run_eager
from doubleweave.errors import PolicyError
from doubleweave.ir.cache_format import CACHE_FORMATS
from doubleweave.ir.split import rows

pytestmark = pytest.mark.usefixtures("lowered_once")
SMALLER = CACHE_FORMATS[1:]
IDS = np.array([number % 250 for number in range(7, 7 + 77 * 13, 13)])
# A row of the toy's cache: heads of so many numbers, K and V of each layer.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@pytest.fixture(scope="module")
def program(made_once):
    """A program of the toy with a cache in a format; compiling checks it against the source."""

    def made(cache, quantize="none", **options):
        name = "_".join(map(str, (cache, quantize, *options.values())))
        return made_once(
            f"cache_{name}",
            lambda folder: dw.compile_llm(
                toys.model(), folder, quantize=quantize, cache=cache, **{"chunk": (32,), **options}
            ),
        )

    return made


def splits(cache, quantize="none", tmp_path=None):
    options = Options(backends()["xnnpack"], quantize, rows(1, 32), toys.MAX_CONTEXT, cache=cache)
    return splits_of(toys.model(), options, tmp_path, lambda *_: None)


@pytest.mark.parametrize("cache", SMALLER)
def test_the_program_is_its_split_over_such_a_cache(program, cache, tmp_path):
    session = dw.open(program(cache)).session()
    found = session.score(IDS)
    lowered = splits(cache, tmp_path=tmp_path).lowered
    wanted = run_eager(lowered, torch.from_numpy(IDS)[None], 32)[0].numpy()
    exact = run_eager(lowered, torch.from_numpy(IDS)[None])[0].numpy()
    assert np.allclose(wanted, exact, atol=1e-4)  # chunks see what the cache keeps, not what they computed
    # Queries and weights may be rounded to bfloat16 as well, which has 8 digits.
    bound = 2e-4 if cache == "float16" else 2e-2
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.parametrize("cache", SMALLER)
def test_a_cache_takes_so_many_bytes(program, toy_program_dir, cache):
    def row_bytes(folder):
        values = [v for v in dw.open(folder).split.values if v.kind == "cache"]
        return {v.dtype for v in values}, sum(v.row_bytes for v in values)

    dtypes, found = row_bytes(program(cache))
    _, in_float32 = row_bytes(toy_program_dir)
    scales = 4 * 2 * toys.NUM_LAYERS * toys.module().config.num_key_value_heads if cache == "int8" else 0
    assert dtypes == {cache}
    assert found == in_float32 * BYTES[cache] // 4 + scales
    session = dw.open(program(cache)).session()
    session.append(IDS)
    assert session.kv_bytes >= found * len(IDS)


def test_defaults(toy_program_dir, toy_8da8w_dir, toy_static_dir):
    for folder, dtype in ((toy_program_dir, "float32"), (toy_8da8w_dir, "bfloat16")):
        assert {v.dtype for v in dw.open(folder).split.values if v.kind == "cache"} == {dtype}


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_a_segment_elsewhere_has_one_behind_it_that_stores(program, cache):
    """Fixed sizes stand for an NPU: its segments give float32, and a call on the CPU writes the cache."""
    split = dw.open(program(cache, shape="static", chunk=(1, 32))).split
    storing = [call for call in split.calls if call.segment == "cache.rows"]
    assert len(storing) == toys.NUM_LAYERS
    assert split.segment("cache.rows").device == "cpu"
    blocks = [s for s in split.segments if s.name.startswith("block")]
    assert all(port.dtype == "float32" for s in blocks for port in s.outputs)
    bounded = dw.open(program(cache)).session().score(IDS)
    static = dw.open(program(cache, shape="static", chunk=(1, 32))).session().score(IDS)
    assert np.allclose(static, bounded, atol=1e-3 * np.abs(bounded).max())


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_going_back_and_going_on(program, cache):
    session = dw.open(program(cache)).session()
    session.append(IDS[:40])
    wanted = session.append(IDS[40:50])
    session.truncate(40)
    assert np.array_equal(session.append(IDS[40:50]), wanted)


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_without_python(program, cache, tmp_path):
    folder = program(cache)
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    runner = Path(sys.executable).parent / "doubleweave-run"
    command = [runner, folder, "--token-ids", tmp_path / "ids.json", "-n", "12", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])["token_ids"]
    assert tuple(found) == dw.open(folder).generate(IDS, max_new_tokens=12).token_ids


@pytest.mark.parametrize("cache", SMALLER)
@pytest.mark.parametrize("num_heads", [1, 3])
def test_rows_are_those_of_the_native_kernel(cache, num_heads):
    from doubleweave import _native

    x = torch.randn(1, 5, num_heads * 20)
    x[0, 0], x[0, 1, 0], x[0, 2, 1] = 0, 1e30, 1e-30
    wanted = stored(x, num_heads, getattr(torch, cache))
    shape = empty_rows(x, num_heads, getattr(torch, cache))
    assert (wanted.shape, wanted.dtype) == (shape.shape, shape.dtype)
    row_bytes = wanted[0, 0].numel() * wanted.element_size()
    kv_cache = _native.KvCache([row_bytes], 8)
    kv_cache.write(0, x[0].numpy(), num_heads, cache)
    assert bytes(kv_cache.view(0, 5, "uint8")) == wanted.view(torch.uint8).numpy().tobytes()
    largest = x.abs().amax(-1, keepdim=True) if cache == "int8" else x.abs()
    if cache != "float16":  # which has infinities beyond 65,504
        assert ((as_float(wanted) - x).abs() <= largest * 2**-7).all()


def test_rows_that_do_not_fit():
    from doubleweave import _native

    cache = _native.KvCache([24], 8)
    x = np.zeros((2, 20), np.float32)
    for heads, dtype in ((1, "bfloat16"), (3, "int8"), (1, "int16")):
        with pytest.raises(Exception, match=r"fit|head size|cache in"):
            cache.write(0, x, heads, dtype)
    cache.write(0, x, 1, "int8")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cache": "int4"}, "cache: found 'int4', expected one of float32, bfloat16, float16, int8"),
        (
            {"cache": "int8", "attention": "static", "max_context": 64},
            "cache: found 'int8', but static attention computes over float32",
        ),
    ],
)
def test_formats_that_are_refused(tmp_path, options, sentence):
    with pytest.raises(PolicyError) as error:
        dw.compile_llm(toys.model(), tmp_path / "out", **options)
    assert str(error.value).startswith(sentence)
    assert not (tmp_path / "out").exists()


def test_what_is_shown(program, cli):
    code, out, _ = cli("inspect", program("int8"))
    assert code == 0
    assert "bytes a token in int8" in out
