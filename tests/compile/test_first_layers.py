"""The first layers of a model: how many have all that there is in it, and the module without the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import toys
from doubleweave.sources.first_layers import enough_layers, first_layers

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def module_of(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def gemma(num_layers: int) -> Any:
    """Five layers with a window, then one without, and so on."""
    return module_of(transformers.Gemma3TextConfig(**TINY, num_hidden_layers=num_layers))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: toys.module(num_layers=4), 2),
        (lambda: toys.module(num_layers=3), None),  # two of three are more than half
        (lambda: gemma(26), 7),  # all kinds of neighbours; the last layer has a window, as the seventh
        (lambda: gemma(24), 12),  # the last one has none, as the twelfth
        (lambda: gemma(12), None),
        (lambda: torch.nn.Linear(2, 2), None),
    ],
)
def test_enough_layers(make: Any, wanted: int | None) -> None:
    assert enough_layers(make()) == wanted


def test_the_others_are_out_for_a_while() -> None:
    module = gemma(24)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        whole = module(ids).logits
        layers, kinds = list(module.model.layers), list(module.config.layer_types)
        with first_layers(module, 7):
            assert list(module.model.layers) == layers[:7]
            assert module.config.num_hidden_layers == 7
            assert module.config.layer_types == kinds[:7]
            few = module(ids, use_cache=True)
            assert len(few.past_key_values) == 7
        assert not torch.equal(few.logits, whole)
        assert torch.equal(module(ids).logits, whole)
    assert module.config.layer_types == kinds
    assert module.config.num_hidden_layers == 24


def test_an_error_inside_leaves_the_module_whole() -> None:
    module = gemma(24)
    with pytest.raises(KeyError), first_layers(module, 7):
        raise KeyError
    assert len(module.model.layers) == module.config.num_hidden_layers == len(module.config.layer_types) == 24
