"""A tiny model of each root on Qualcomm's compiler and emulator: what the NPU takes, and what stays on the CPU.

    ROOTS=all pytest tests/vendors/test_qnn_roots.py

Without ROOTS one is tried; all take some minutes.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from test_qnn import SIZES, sdk_or_skip

import architectures
from roots import NAMED


@pytest.mark.parametrize("root", NAMED or ("deepseek_v3",))
def test_two_layers_on_the_emulator(root, tmp_path, capsys):
    import doubleweave as dw
    from doubleweave.cli.main import main
    from doubleweave.sources.hugging_face import from_module

    sdk_or_skip()
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(np.random.default_rng(0).integers(3, 260, 48).tolist()))
    source = from_module(architectures.tiny_model(root), root, None)
    options = {"soc": "SM8650", "quantize": "16a8w", "calibrate": ids, "emulate": True}
    kept: dict[str, str] = {}
    while True:
        try:
            manifest = dw.compile_llm(
                source, tmp_path / "out", backend="qnn", chunk=SIZES, max_context=64, keep=kept, **options
            )
            break
        except dw.LowerError as error:  # QNN refuses it, and the message says what to do
            print(f"{root}: {error}")
            name = re.search(r"--keep (\w+)=cpu$", str(error))[1]
            assert name not in kept
            kept[name] = "cpu"
    on_npu = {segment.name for segment in manifest.split.segments if segment.device == "npu"}
    assert on_npu, "nothing is left for the NPU"
    assert manifest.check.ran == "program"  # held against the quantized split, on the emulator
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for segment in manifest.split.segments:
        assert segment.name in printed
    print(root, "npu:", sorted(on_npu), "cpu:", sorted({s.name for s in manifest.split.segments} - on_npu))
