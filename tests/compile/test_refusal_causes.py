"""A refused export names the module, its class and what it does. Toys that torch.export refuses, each for one cause."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import architectures
from doubleweave.compiler.graph.export_llm import export_llm
from doubleweave.compiler.graph.refusal_causes import cause_of, watching
from doubleweave.errors import SplitError

MOST = 128


class Looping(nn.Module):
    def forward(self, x_TF: Tensor) -> Tensor:
        total = x_TF[0]
        for row in range(x_TF.shape[0]):
            total = total + x_TF[row]
        return x_TF + total


class Recurrent(Looping):
    def forward(self, x_TF: Tensor, cache: nn.Module | None = None) -> Tensor:
        if cache is not None:
            return cache.recurrent_states + x_TF  # type: ignore[operator]
        return super().forward(x_TF)


class Even(nn.Module):
    def forward(self, x_TF: Tensor) -> Tensor:
        return x_TF.view(x_TF.shape[0] // 3, 3, -1).flatten(0, 1)


class Deciding(nn.Module):
    def forward(self, x_TF: Tensor) -> Tensor:
        return x_TF if x_TF.sum() > 0 else -x_TF


class Masking(nn.Module):
    def forward(self, x_TF: Tensor, mask: Tensor | None = None) -> Tensor:
        return x_TF * mask[:, 0]  # type: ignore[index]


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), layer])

    def forward(self, x_TF: Tensor) -> Tensor:
        for layer in self.layers:
            x_TF = layer(x_TF)
        return x_TF


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        (Looping(), "(Looping) counts in Python how many tokens there are, as a loop over them does"),
        (
            Recurrent(),
            "(Recurrent) carries a state from token to token (recurrent_states), besides keys and values",
        ),
        (Even(), "(Even) asks of the number of tokens T that "),
        (
            Deciding(),
            "(Deciding) decides in Python by numbers that it computed from the tokens, at `return x_TF if ",
        ),
        (
            Masking(),
            "(Masking) reads the attention mask itself, which programs do not make, at `return x_TF * mask",
        ),
    ],
)
def test_a_cause_names_the_module(layer: nn.Module, cause: str) -> None:
    model = Model(layer)
    rows = torch.export.Dim("T", min=1, max=MOST)
    with pytest.raises(Exception) as caught, watching(model) as watch, torch.no_grad():  # noqa: PT011  torch's own
        torch.export.export(model, (torch.ones(33, 4),), dynamic_shapes=({0: rows},), strict=False)
    assert cause_of(caught.value, watch, MOST).startswith(f"layers.1 {cause}")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        (
            "blt",
            # Which comes first depends on what was exported before.
            r"model\.patcher \(BltPatcher\) decides in Python|BltCrossAttention is not causal|"
            r"model \(BltModel\) asks of the number of tokens T that T >= 3",
        ),
        (
            "xlnet",
            r"transformer\.layer\.0\.rel_attn \(XLNetRelativeAttention\) asks of the number of tokens T that",
        ),
    ],
)
def test_a_language_model_is_refused_with_its_cause(model_type: str, said: str) -> None:
    with pytest.raises(SplitError) as caught:
        export_llm(architectures.tiny_model(model_type), MOST)
    assert re.search(said, str(caught.value))
