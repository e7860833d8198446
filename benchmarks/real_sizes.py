"""Models of real size: what compiling them takes, and how large their programs are.

Weights are random, in bfloat16 and true shapes, written by the script one tensor at a time (2.5 GB for Llama 3.2 1B,
8 for Qwen3 4B, 16 for Llama 3.1 8B). Memory is the sum of the proportional share (PSS) of all processes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import BenchmarkError, finish, note, parser, run, table, target
from compile_run import timed_compile

LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "rope_parameters": LLAMA["rope_parameters"] | {"factor": 8.0},
}
QWEN_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
# By shape: transformers' class, its config, and what compiling may take: seconds, GB at the peak, GB of program.
SHAPES: dict[str, tuple[str, dict[str, Any], tuple[float, float, float]]] = {
    "llama-1b": ("Llama", LLAMA, (35, 2.0, 0.85)),
    "qwen3-4b": ("Qwen3", QWEN_4B, (90, 3.0, 2.5)),
    "llama-8b": ("Llama", LLAMA_8B, (150, 4.0, 5.1)),
}
RECIPE = "8da4w"
OPTIONS = ["--quantize", RECIPE, "--max-context", "4096"]
_SHARD_BYTES = 2 << 30


def main() -> None:
    args = arguments()
    rows = [
        ["shape", "wall s", "goal", "CPU s", "peak PSS GB", "goal", "program GB", "goal", "others' CPU"],
    ]
    results: dict[str, Any] = {}
    for shape in args.shape or ["llama-1b"]:
        goals = SHAPES[shape][2]
        weights = weights_of(shape, args.cache)
        note(f"compiling {shape} {RECIPE}")
        with tempfile.TemporaryDirectory(dir=args.cache) as folder:
            options = [*OPTIONS, *(["--no-check"] if args.no_check else [])]
            found = timed_compile(weights, Path(folder) / "program", options)
        size = found.summary["program_bytes"] / 1e9
        numbers = (found.wall_s, found.peak_pss_bytes / 1e9, size)
        held = [target(number, goal, at_least=False) for number, goal in zip(numbers, goals, strict=True)]
        texts = [(f"{h['value']:.2f}", f"{h['at_most']:g} {'met' if h['met'] else 'not met'}") for h in held]
        rows.append([shape, *texts[0], f"{found.cpu_s:.0f}", *texts[1], *texts[2], f"{found.other_cpu:.0%}"])
        results[shape] = dict(zip(("wall_s", "peak_pss_gb", "program_gb"), held, strict=True)) | {
            "cpu_s": found.cpu_s,
            "other_cpu": found.other_cpu,
        }
    finish(
        "real_sizes", [table(rows)], {"recipe": RECIPE, "is_checked": not args.no_check, "shapes": results}
    )


def add_shape(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--shape",
        action="append",
        choices=list(SHAPES),
        help="only this shape; may be repeated (default: llama-1b)",
    )


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    add_shape(p)
    p.add_argument("--no-check", action="store_true", help="compile without the check against the source")
    return p.parse_args()


def weights_of(shape: str, cache: Path) -> Path:
    """The folder of a shape's weights, written first if it is missing."""
    weights = cache / "weights" / shape
    if not (weights / "config.json").exists():
        note(f"writing random weights: {shape}")
        write_weights(shape, weights)
    return weights


def write_weights(shape: str, folder: Path) -> None:
    """A Hugging Face folder of random weights in bfloat16, in shards, one in memory at a time."""
    import torch
    import transformers
    from safetensors.torch import save_file

    name, settings, _ = SHAPES[shape]
    config = getattr(transformers, f"{name}Config")(
        **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16"
    )
    with torch.device("meta"):
        module = getattr(transformers, f"{name}ForCausalLM")(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if shutil.disk_usage(folder.parent.parent).free < 1.1 * 2 * sum(map(math.prod, shapes.values())):
        raise BenchmarkError(f"{folder}: the disk is too full for the weights of {shape}")
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for key, size in shapes.items():
        tensor = torch.empty(size, dtype=torch.bfloat16)
        tensor.fill_(1) if len(size) == 1 else tensor.normal_(0, 0.02, generator=generator)
        shard[key] = tensor
        if sum(each.nbytes for each in shard.values()) > _SHARD_BYTES:
            write()
    write()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
