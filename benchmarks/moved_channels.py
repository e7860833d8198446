"""The same model in a GGUF of float16 whose weights lie on no grid: each channel is moved against the others.

Where a channel is made (a norm's weight, the up-projection's and values' rows) it is divided by a factor, and the
columns of the weights that read it are multiplied by it, so that the model computes what it did. Knows nothing of
recipes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_moved(source: Path, out: Path, spread: float) -> None:
    """Write the Llama-like GGUF `source` so, float16, with all that it says of itself; factors lie between exp(-spread)
    and exp(spread)."""
    import gguf

    reader = gguf.GGUFReader(source)
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    num_heads = reader.fields[f"{architecture}.attention.head_count"].contents()
    _move(weights, num_heads, spread)
    writer = gguf.GGUFWriter(out, architecture)
    for field in reader.fields.values():
        if field.name in ("general.architecture", "general.file_type") or field.name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, weight in weights.items():
        writer.add_tensor(name, weight.astype(np.float16) if weight.ndim > 1 else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _move(weights: dict[str, Any], num_heads: int, spread: float) -> None:
    generator = np.random.default_rng(0)

    def factors(count: int) -> Any:
        return np.exp(generator.uniform(-spread, spread, count)).astype(np.float32)

    for block in range(sum(name.endswith("attn_norm.weight") for name in weights)):
        own = {name: f"blk.{block}.{name}.weight" for name in (
            "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
        )}  # fmt: skip
        for norm, readers in (
            ("attn_norm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", ("ffn_gate", "ffn_up")),
        ):
            each = factors(len(weights[own[norm]]))
            weights[own[norm]] /= each
            for reader in readers:
                weights[own[reader]] *= each
        each = factors(len(weights[own["ffn_up"]]))
        weights[own["ffn_up"]] /= each[:, None]
        weights[own["ffn_down"]] *= each
        values = weights[own["attn_v"]]
        each = factors(len(values))
        values /= each[:, None]
        output = weights[own["attn_output"]]
        head = weights[own["attn_q"]].shape[0] // num_heads
        repeated = np.repeat(each.reshape(-1, head), output.shape[1] // len(each), axis=0).reshape(-1)
        output *= repeated
