"""Models of real size: what compiling them takes, and how large their programs are.

Weights are random, in bfloat16 and true shapes, written by the script one tensor at a time (2.5 GB for Llama 3.2 1B,
8 for Qwen3 4B, 16 for Llama 3.1 8B), or in a GGUF file of quantized ones (--gguf Q4_K_M). Memory is the sum of the
proportional share (PSS) of all processes.
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
from random_gguf import KINDS, MIX, write_gguf

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
GEMMA_270M: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
# By shape: transformers' model type, its config, and what compiling may take: seconds, GB at the peak, GB of program
# (None: no goal).
Goals = tuple[float, float, float] | tuple[None, None, None]
SHAPES: dict[str, tuple[str, dict[str, Any], Goals]] = {
    "gemma3-270m": ("gemma3_text", GEMMA_270M, (None, None, None)),
    "llama-1b": ("llama", LLAMA, (35, 2.0, 0.85)),
    "qwen3-4b": ("qwen3", QWEN_4B, (90, 3.0, 2.5)),
    "llama-8b": ("llama", LLAMA_8B, (150, 4.0, 5.1)),
}
# Of a GGUF file of Q4_K_M: what of its bytes a program in 8da4w may take.
MOST_OF_GGUF = 1.15
RECIPE = "8da4w"
OPTIONS = ["--quantize", RECIPE, "--max-context", "4096"]
_SHARD_BYTES = 2 << 30


def main() -> None:
    args = arguments()
    goal = "goal"
    rows = [
        [
            "shape",
            "wall s",
            goal,
            "CPU s",
            "peak PSS GB",
            goal,
            "program GB",
            goal,
            "of source",
            goal,
            "others' CPU",
        ]
    ]
    results: dict[str, Any] = {}
    for shape in args.shape or ["llama-1b"]:
        held, others = measured(shape, args)
        results[shape] = held | others
        texts = {name: _held_text(found) for name, found in held.items()}
        cells = [*texts["wall_s"], f"{others['cpu_s']:.0f}", *texts["peak_pss_gb"], *texts["program_gb"]]
        share = texts.get("of_source") or (f"{others['of_source']:.2f}", "-")
        rows.append([shape, *cells, *share, f"{others['other_cpu']:.0%}"])
    about = {"recipe": RECIPE, "is_checked": not args.no_check, "gguf": args.gguf}
    finish("real_sizes", [table(rows)], {**about, "shapes": results})


def measured(shape: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """Of compiling the shape: what has a goal, and what has none (`of_source`: program over weights, in bytes)."""
    weights = weights_of(shape, args.cache, args.gguf)
    note(f"compiling {weights.name} {RECIPE}")
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        options = [*OPTIONS, *(["--no-check"] if args.no_check else [])]
        found = timed_compile(weights, Path(folder) / "program", options)
    size = found.summary["program_bytes"]
    numbers = {"wall_s": found.wall_s, "peak_pss_gb": found.peak_pss_bytes / 1e9, "program_gb": size / 1e9}
    goals: dict[str, float | None] = dict(zip(numbers, SHAPES[shape][2], strict=True))
    others = {"cpu_s": found.cpu_s, "other_cpu": found.other_cpu}
    if args.gguf == MIX:
        numbers["of_source"], goals["of_source"] = size / _bytes_of(weights), MOST_OF_GGUF
    else:
        others["of_source"] = size / _bytes_of(weights)
    held = {}
    for name, value in numbers.items():
        goal = goals[name]
        held[name] = {"value": value} if goal is None else target(value, goal, at_least=False)
    return held, others


def _held_text(found: dict[str, Any]) -> tuple[str, str]:
    """A value, and its goal."""
    goal = f"{found['at_most']:g} {'met' if found['met'] else 'not met'}" if "at_most" in found else "-"
    return f"{found['value']:.2f}", goal


def _bytes_of(weights: Path) -> int:
    files = [weights] if weights.is_file() else weights.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


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
    p.add_argument(
        "--gguf", choices=KINDS, help="compile a GGUF file of such weights (default: bfloat16 in a folder)"
    )
    p.add_argument("--no-check", action="store_true", help="compile without the check against the source")
    return p.parse_args()


def weights_of(shape: str, cache: Path, gguf: str | None = None) -> Path:
    """The folder of a shape's weights, or the GGUF file of such types, written first if it is missing."""
    weights = cache / "weights" / (shape if gguf is None else f"{shape}-{gguf}.gguf")
    if not weights.is_file() and not (weights / "config.json").exists():
        note(f"writing random weights: {weights.name}")
        if gguf is None:
            write_weights(shape, weights)
        else:
            write_gguf(weights, _module_of(shape), gguf)
    return weights


def _module_of(shape: str) -> Any:
    """transformers' module, without memory."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, settings, _ = SHAPES[shape]
    config = CONFIG_MAPPING[kind](
        **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16"
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_weights(shape: str, folder: Path) -> None:
    """A Hugging Face folder of random weights in bfloat16, in shards, one in memory at a time."""
    import torch
    from safetensors.torch import save_file

    module = _module_of(shape)
    config = module.config
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
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
