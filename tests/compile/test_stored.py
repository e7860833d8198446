"""What weights are kept in is counted, and shown."""

from __future__ import annotations

from collections import Counter

import pytest

import architectures
import toys
from doubleweave.cli.show_program import inspect_dict, inspect_table
from doubleweave.compiler.quantize.stored import with_stored
from doubleweave.compiler.quantize.tables import quantize_tables
from doubleweave.compiler.quantize.weights import quantize
from doubleweave.ir.manifest import read
from exports import split_of

TABLE = toys.VOCAB_SIZE * toys.HIDDEN


def found(module, recipe, table="int8"):
    split = quantize(split_of(module), recipe)
    split = split if recipe == "none" else quantize_tables(split, table)
    return {segment.name: by_format(segment.stored) for segment in with_stored(split).split.segments}


def by_format(stored):
    counts = Counter()
    for item in stored:
        counts[item.format] += item.weights
    return dict(counts)


def linears(module):
    """The weights of a module's linears but the head's."""
    return sum(
        parameter.numel()
        for name, parameter in module.named_parameters()
        if name.endswith("_proj.weight") and "layers" in name
    )


@pytest.mark.parametrize(
    ("recipe", "table", "of_blocks", "of_head", "of_table"),
    [
        ("none", "int8", "float32", "float32", "float32"),
        ("8da8w", "int8", "int8", "int8", "int8"),
        ("8da4w", "int8", "int4_offsets", "int8", "int8"),
        ("8da4w", "int4", "int4_offsets", "int8", "int4_offsets"),
        ("8da4w", "bfloat16", "int4_offsets", "int8", "bfloat16"),
    ],
)
def test_weights_are_counted(recipe, table, of_blocks, of_head, of_table):
    counts = found(toys.module(), recipe, table)
    blocks = [each for name, each in counts.items() if name.startswith("block_")]
    assert {name for each in blocks for name in each} == {of_blocks}
    assert sum(each[of_blocks] for each in blocks) == linears(toys.module())
    assert counts["lm_head"] == {of_head: TABLE}
    assert counts["embed_tokens"] == {of_table: TABLE}
    assert counts["rotary"] == {}


def test_experts_are_counted_and_routers():
    module = architectures.tiny_model("qwen3_moe")
    counts = found(module, "8da4w")
    config = module.config
    of_experts = config.num_experts * 3 * 64 * config.moe_intermediate_size
    assert counts["block_2"]["float32"] == 64 * config.num_experts
    assert counts["block_2"]["int4_offsets"] > of_experts
    assert {name for each in counts.values() for name in each} == {"float32", "int4_offsets", "int8"}


def test_inspect_shows_them(toy_8da4w_dir):
    manifest = read(toy_8da4w_dir)
    assert "million in int4_offsets (q, k, v, o, gate, up, down)" in inspect_table(manifest)
    assert "million in int8 (table, head)" in inspect_table(manifest)
    assert "calibrated on 256 tokens of the package's text" in inspect_table(manifest)
    segments = {segment["name"]: segment["stored"] for segment in inspect_dict(manifest)["segments"]}
    assert segments["lm_head"] == [{"role": "head", "format": "int8", "weights": TABLE}]
