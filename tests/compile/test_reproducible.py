"""A program folder is the same byte for byte in every process: no order of a set reaches it."""

from __future__ import annotations

import os
import subprocess
import sys

_KINDS = "sliding_attention", "full_attention"
_COMPILE = """
import sys
import architectures, doubleweave as dw
from doubleweave.sources.hugging_face import from_module
model = from_module(architectures.tiny_model(sys.argv[1]), "toy", None)
dw.compile_llm(model, sys.argv[2], quantize=sys.argv[3], check=False)
"""


def in_process(seed, *argv):
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)),
    }
    done = subprocess.run([sys.executable, "-c", *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def seeds():
    """Two seeds by which a set of the two kinds of layers has other orders."""
    # Where two hashes collide the order is that in which the names came; such seeds are passed over.
    script = f"a, b = {_KINDS}; print(*{{a, b}}) if list({{a, b}}) == list({{b, a}}) else print()"
    orders = {in_process(seed, script): seed for seed in range(16)}
    orders.pop("\n", None)
    assert len(orders) == 2
    return list(orders.values())


def test_two_rotary_tables_have_one_order(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, seed in zip(folders, seeds(), strict=True):
        in_process(seed, _COMPILE, "modernbert-decoder", str(folder), "8da8w")
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
