"""What running a program, or predicting how it runs, must not import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Needs of compiling, which a phone or a server that only runs programs does not have.
COMPILE_TIME = ("torch", "transformers", "executorch", "torchao", "gguf", "safetensors")

RUN = """
import json, sys
import doubleweave
program = doubleweave.open(sys.argv[1])
result = program.generate([1, 2, 3], max_new_tokens=4)
assert 1 <= result.new_tokens <= 4
program.generate("hi", max_new_tokens=2, temperature=0.7, seed=1)
found = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(found))
"""

COMMANDS = """
import json, sys
from doubleweave.cli.main import main
folder, text = sys.argv[1:]
assert main(["run", folder, "-p", "hi", "-n", "3", "--trace", "--json"]) == 0
assert main(["inspect", folder, "--json"]) == 0
assert main(["bench", folder, "--prompt-len", "9", "--gen", "2", "--runs", "1"]) == 0
assert main(["score", folder, text]) == 0
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("code", [RUN, COMMANDS], ids=["python", "commands"])
def test_running_a_program_imports_nothing_of_compiling(code, toy_program_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    arguments = [str(toy_program_dir)] + ([str(text)] if code is COMMANDS else [])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "numpy" in found
    assert not set(found) & set(COMPILE_TIME)


PREDICT = """
import sys
for absent in ("doubleweave._native", "executorch", "torch", "transformers"):
    sys.modules[absent] = None
from doubleweave.cli.main import main
folder, trace = sys.argv[1:]
for profile in ("generic", "sm8650"):
    wanted = ["--profile", profile, "--prompt-len", "200", "--json"]
    assert main(["simulate", folder, *wanted, "--schedule", "wavefront", "--threads", "2", "--trace", trace]) == 0
    assert main(["plan", folder, *wanted]) == 0
assert main(["trace", trace, trace]) == 0
"""


def test_predicting_needs_neither_torch_nor_executorch(toy_program_dir, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(toy_program_dir), str(tmp_path / "a.json")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
