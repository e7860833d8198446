"""What linears are for is found in how their results are used."""

from __future__ import annotations

import pytest

import architectures
from doubleweave.compiler.quantize.roles import roles_of
from exports import split_of

DENSE = ["o", "gate", "up", "down", "q", "k", "v"]


@pytest.mark.parametrize(
    ("family", "of_block"),
    [
        ("llama", DENSE),
        ("phi3", DENSE),  # q, k and v are one weight of the module, as are gate and up
        ("gemma2", DENSE),
        ("gpt2", ["o", "up", "down", "q", "k", "v"]),  # weights are transposed, in addmm
        (
            "falcon",
            ["o", "qkv", "up", "down"],
        ),  # of products that are no linears; attention and MLP side by side
        ("gptj", ["o", "v", "k", "q", "up", "down"]),
        ("bloom", ["o", "up", "down", "qkv"]),  # features of q, k and v alternate
        ("mixtral", ["o", "router", "gate", "up", "down", "q", "k", "v"]),  # experts, and what chooses them
        (
            "gpt_oss",
            ["o", "router", "gate", "up", "down", "q", "k", "v"],
        ),  # the gate's product is of `up + 1`
        ("deepseek_v3", ["o", "gate", "up", "down", "other", "q", "other", "k", "kv"]),  # latents
    ],
)
def test_roles(family, of_block):
    found = roles_of(split_of(architectures.tiny_model(family)))
    assert of_block in [list(roles.values()) for roles in found.values()]
    assert list(found["lm_head"].values()) == ["head"]


def test_layers_without_attention_are_other():
    found = roles_of(split_of(architectures.tiny_model("mamba")))
    assert {role for roles in found.values() for role in roles.values()} == {"other", "head"}
