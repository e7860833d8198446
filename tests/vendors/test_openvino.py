"""OpenVINO: static segments compiled for this machine's CPU and run for real, beside dynamic attention."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import toys
from doubleweave.errors import BackendError, PolicyError
from doubleweave.vendors import openvino

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)

IDS = [number % 250 for number in range(7, 7 + 45 * 13, 13)]


def compiled(made_once, recipe):
    import doubleweave as dw

    options = {"backend": "openvino", "quantize": recipe, "chunk": (1, 8, 32)}
    return made_once(f"openvino_{recipe}", lambda folder: dw.compile_llm(toys.model(), folder, **options))


@pytest.fixture(scope="module")
def float32_dir(made_once):
    return compiled(made_once, "none")


@pytest.fixture(scope="module")
def int8_dir(made_once):
    pytest.importorskip("nncf")
    return compiled(made_once, "8w")


def logits(folder, schedule="sequential", **options):
    """Of IDS and of 11 greedy tokens behind them, in a process of its own: what OpenVINO may use is set once in one."""
    code = f"""
import json, sys
import doubleweave as dw
session = dw.open(sys.argv[1]).session({schedule!r}, **{options!r})
found = [session.append({IDS}).tolist()]
while len(found) < 12:
    found.append(session.append([found[-1].index(max(found[-1]))]).tolist())
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)


def test_the_manifest_shows_the_delegate(float32_dir, cli):
    from doubleweave.ir import manifest

    split = manifest.read(float32_dir).split
    found = split.segments_of("openvino")
    assert {segment.name for segment in found} == {"block_0", "block_1", "block_2", "block_3", "lm_head"}
    assert all(
        segment.target == "CPU" and segment.num_delegated == segment.num_operators for segment in found
    )
    assert not split.segment("attention").num_delegated
    assert b"OpenvinoBackend" in (float32_dir / "program.pte").read_bytes()
    code, out, _ = cli("inspect", float32_dir)
    assert code == 0
    assert "openvino" in out


@pytest.mark.parametrize(
    ("schedule", "options"),
    [("sequential", {}), ("out_of_order", {"workers": ("npu", "cpu")}), ("wavefront", {}), ("auto", {})],
)
def test_the_same_tokens_as_xnnpack_in_float32(float32_dir, toy_static_dir, schedule, options):
    expected, found = logits(toy_static_dir), logits(float32_dir, schedule, **options)
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_int8_weights_are_near_float32(float32_dir, int8_dir):
    expected, found = logits(float32_dir)[0], logits(int8_dir)[0]
    noise = 10 * math.log10(float((expected**2).sum() / ((found - expected) ** 2).sum()))
    assert 20 < noise < 80, "less would be wrong, and more is no 8 bits"
    sizes = [(folder / "program.pte").stat().st_size for folder in (float32_dir, int8_dir)]
    assert sizes[1] < 0.7 * sizes[0]


def test_the_runner_without_python_gives_the_same_tokens(float32_dir, tmp_path):
    runner = Path(sys.executable).parent / "doubleweave-run"
    if not runner.exists():
        pytest.skip("doubleweave-run was not built (its sources of PCRE2 and JSON could not be fetched)")
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    library = str(openvino.find_openvino().library)
    done = subprocess.run(
        [runner, float32_dir, "--token-ids", tmp_path / "ids.json", "-n", "12", "--json"],
        env={**os.environ, "OPENVINO_LIB_PATH": library, "OV_CPU_MAX_ISA": "AVX512_CORE_VNNI"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])["token_ids"]
    expected = logits(float32_dir).argmax(1).tolist()
    assert found == expected[: len(found)]
    assert len(found) == 12 or expected[len(found)] == toys.EOS_ID


def test_devices_that_are_not_there(tmp_path, refused):
    missing = [d for d in openvino.DEVICES if d not in openvino.available_devices()]
    for device in missing:
        with pytest.raises(
            BackendError, match=rf"device {device}: OpenVINO \S+ finds CPU.* here; use a machine"
        ):
            openvino.check_device(device)
    line = refused("compile", "smollm2", "-o", tmp_path / "x", "--backend", "openvino", "--device", "VPU")
    assert "device: found 'VPU', expected one of CPU, GPU, NPU" in line
    assert not (tmp_path / "x").exists()


def test_options_that_do_not_go_together(tmp_path):
    import doubleweave as dw

    def refuses(message, **options):
        with pytest.raises(PolicyError, match=message):
            dw.compile_llm(toys.model(), tmp_path / "x", **options)

    refuses("device: is an option of the openvino backend", device="CPU")
    refuses("soc: is an option of the qnn backend", backend="openvino", soc="SM8650")
    refuses("shape: found 'bounded', but openvino takes fixed sizes", backend="openvino", shape="bounded")
    refuses(
        "quantize: found '8da8w', expected one of 8w, none for openvino", backend="openvino", quantize="8da8w"
    )


def test_without_openvino_the_way_out_is_said(monkeypatch, float32_dir, refused, tmp_path):
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("OPENVINO_LIB_PATH", raising=False)
    (tmp_path / "ids.json").write_text("[1]")
    line = refused("run", float32_dir, "--token-ids", tmp_path / "ids.json", "-n", 1)
    assert "OpenVINO is not installed; run: pip install 'doubleweave[openvino]'" in line
    openvino.available_devices.cache_clear()
    line = refused("compile", "smollm2", "-o", tmp_path / "x", "--backend", "openvino")
    assert "OpenVINO is not installed" in line


def test_doctor_names_version_and_devices(cli):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out.splitlines()[-1])["backends"]["openvino"]
    assert code == 0
    assert found["works"]
    assert "CPU" in found["devices"]
    assert found["version"].startswith("2026")


def test_all_static_gives_the_same_tokens(toy_static_dir, tmp_path):
    import doubleweave as dw

    folder = tmp_path / "all-static"
    options = {"attention": "static", "max_context": 96, "chunk": (1, 32), "quantize": "none"}
    dw.compile_llm(toys.model(), folder, backend="openvino", **options)
    expected, found = logits(toy_static_dir), logits(folder)
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()
