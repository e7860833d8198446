"""What holds for models of many gigabytes, on small ones: memory follows one layer, not their number."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Compiles a folder and prints how much memory it took at most, in bytes. One core: it does all in this process.
COMPILE = """
import os, resource, sys
os.sched_getaffinity = lambda pid: {0}
from doubleweave.sources import streamed_module
streamed_module.LEAST_BYTES = 0
from doubleweave.entries import check_compiled
check_compiled.LARGE_BYTES = 0
from doubleweave.compiler.split import weights
weights._KEPT_BYTES = 0  # what is kept has a bound, which so few layers do not reach
import doubleweave
made = doubleweave.compile_llm(sys.argv[1], sys.argv[2], quantize="8da4w", max_context=64)
assert made.check.layers == 2
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
WIDTH, INNER = 1024, 4096


def folder_of(path: Path, num_layers: int) -> None:
    """Random weights in bfloat16."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        vocab_size=256,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(config)
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for weight in module.parameters():
        weight.data.fill_(1) if weight.ndim == 1 else weight.data.normal_(0, 0.02)
    module.save_pretrained(path)


def peak(folder: Path, out: Path) -> int:
    command = [sys.executable, "-c", COMPILE, str(folder), str(out)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def test_memory_follows_one_layer(tmp_path: Path) -> None:
    layer = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # float32
    sizes = (4, 7)
    for size in sizes:
        folder_of(tmp_path / f"{size}", size)
    with ThreadPoolExecutor() as pool:
        few, many = pool.map(lambda size: peak(tmp_path / f"{size}", tmp_path / f"out-{size}"), sizes)
    assert many - few < layer


def test_memory_that_runs_out(tmp_path: Path) -> None:
    """A limit that leaves room for the libraries and not for the model."""
    folder_of(tmp_path / "model", 4)
    limited = """
import resource, sys
import scipy.optimize  # its OpenBLAS waits for ever where it finds no memory
import torch, executorch.exir
from doubleweave.cli.main import main
from doubleweave.sources import load
load(sys.argv[1])  # what else is imported
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), resource.RLIM_INFINITY))
sys.exit(main(["compile", sys.argv[1], "-o", sys.argv[2], "--quantize", "none"]))
"""
    command = [sys.executable, "-c", limited, str(tmp_path / "model"), str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "doubleweave: memory ran out while" in ended.stderr
    assert "nothing was written. Close other programs, raise the limit" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
