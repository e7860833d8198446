"""Linears are kept in what somebody asks for: by role, segment or pattern, beside a recipe or in its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import architectures
import doubleweave as dw
import toys
from doubleweave.cli.show_program import inspect_table
from doubleweave.compiler.quantize.kept import kept_formats
from doubleweave.compiler.quantize.stored import with_stored
from doubleweave.compiler.quantize.weights import quantize, rounding
from doubleweave.errors import PolicyError
from exports import split_of

CASES = [
    ("8da8w", {"down": "int4"}, {"down": {"int4_offsets"}, "q": {"int8"}, "head": {"int8"}}),
    ("8da4w", {"down": "int8"}, {"down": {"int8"}, "q": {"int4_offsets"}, "head": {"int8"}}),
    ("8da4w", {"head": "int4", "o": "float32"}, {"head": {"int4_offsets"}, "o": {"float32"}}),
    ("8da4w", {"block_1": "int8"}, {"down": {"int8", "int4_offsets"}, "q": {"int8", "int4_offsets"}}),
    ("8da4w", {"block_*.[qk]": "int8"}, {"q": {"int8"}, "k": {"int8"}, "v": {"int4_offsets"}}),
    ("8da4w", {"down": "int8", "block_2.down": "float32"}, {"down": {"int8", "float32"}}),
    ("8da4w", {"*": "float32", "up": "int8"}, {"up": {"int8"}, "q": {"float32"}, "head": {"float32"}}),
]


@pytest.fixture(scope="module")
def toy():
    return split_of(toys.module())


@pytest.mark.parametrize(("recipe", "keep", "expected"), CASES)
def test_what_linears_are_kept_in(toy, recipe, keep, expected):
    asked = kept_formats(toy, keep)
    found: dict[str, set[str]] = {}
    for segment in with_stored(quantize(toy, recipe, asked)).split.segments:
        for item in segment.stored:
            found.setdefault(item.role, set()).add(item.format)
    assert {role: found[role] for role in expected} == expected
    # Weights that are put on grids are those of 4 bits.
    free = rounding(toy, recipe, asked).free
    assert bool(free) == any("int4_offsets" in formats for formats in found.values())


def test_what_experts_are_chosen_by_is_no_ones_to_round():
    split = split_of(architectures.tiny_model("qwen3_moe"))
    asked = kept_formats(split, {"*": "int8"})
    stored = [item for s in with_stored(quantize(split, "8da4w", asked)).split.segments for item in s.stored]
    assert {item.format for item in stored if item.role == "router"} == {"float32"}
    assert {item.format for item in stored if item.role in ("gate", "down", "q")} == {"int8"}


def test_patterns_of_other_layers_match_nothing_in_the_first(toy):
    assert kept_formats(toy, {"block_77": "int8"}, is_part=True) == {}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (
            {"dwon": "int8"},
            r"keep: 'dwon' matches no linear; expected a role \(q, k, v, o, gate, up, down, head\)",
        ),
        ({"block_1.head": "int8"}, "keep: 'block_1.head' matches no linear"),
    ],
)
def test_patterns_that_match_nothing(toy, keep, message):
    with pytest.raises(PolicyError, match=message):
        kept_formats(toy, keep)


def test_four_bits_take_whole_groups():
    config = LlamaConfig(
        hidden_size=72, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    split = split_of(LlamaForCausalLM(config).eval())
    with pytest.raises(PolicyError, match=r"keep: found int4 for block_0\.q, which has 72 input features"):
        kept_formats(split, {"q": "int4"})


RECIPE = """
quantize = "8da4w"
cache = "int8"
table = "bfloat16"

[keep]
down = "int8"
"block_1.*" = "float32"
"""


def test_a_recipe_compiles_and_is_shown(tmp_path, lowered_once):
    path = tmp_path / "careful.toml"
    path.write_text(RECIPE)
    manifest = dw.compile_llm(
        toys.model(), tmp_path / "out", recipe=path, cache="float32", keep={"block_2.down": "int4"}
    )
    assert (manifest.model.quantize, manifest.model.recipe) == ("8da4w", "careful")
    assert manifest.model.keep == {"down": "int8", "block_1.*": "float32", "block_2.down": "int4"}
    stored = {s.name: {item.role: item.format for item in s.stored} for s in manifest.split.segments}
    assert stored["block_1"]["down"] == stored["block_1"]["q"] == "float32"
    assert (stored["block_2"]["down"], stored["block_2"]["q"]) == ("int4_offsets", "int4_offsets")
    assert stored["embed_tokens"] == {"table": "bfloat16"}
    assert {value.dtype for value in manifest.split.values if value.kind == "cache"} == {"float32"}
    assert manifest.check.ran == "program"
    text = inspect_table(manifest)
    assert "recipe careful: 8da4w, but down in int8, block_1.* in float32, block_2.down in int4" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "quantise = '8da4w'",
            "recipe: .*: found key 'quantise', expected only name, quantize, table, cache",
        ),
        ("quantize = 8", "recipe: .*: found quantize = 8, expected a text"),
        ("keep = ['down']", r"recipe: .*: found keep = \['down'\], expected a table"),
        ("keep.down = 4", "recipe: .*: found keep = {'down': 4}, expected a table"),
        ("[keep", "recipe: .* is no TOML"),
        ("keep.down = 'int5'", "keep: found 'int5', expected one of int4, int8, float32"),
        ("quantize = 'none'\nkeep.down = 'int8'", "keep: found it for recipe none"),
        ("quantize = 'q4'", "quantize: found 'q4', expected one of 8da8w, 8da4w, none"),
        ("budget = 0.05", "budget: is an option of the qnn backend"),
        ("calibrate = 'text.txt'", "calibrate: is an option of the qnn backend"),
    ],
)
def test_recipes_that_are_none(text, message, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=message):
        dw.compile_llm(toys.model(), tmp_path / "out", recipe=path)
    assert [found.name for found in tmp_path.iterdir()] == ["wrong.toml"]


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(PolicyError, match=r"recipe: .*nowhere.toml cannot be read \(No such file"):
        dw.compile_llm(toys.model(), tmp_path / "out", recipe=tmp_path / "nowhere.toml")
    assert not list(Path(tmp_path).iterdir())
