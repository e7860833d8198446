"""Rows that rounding decides in the source itself are left out of the check, and no others."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import architectures
import doubleweave as dw
from doubleweave.check import language_model
from doubleweave.check.language_model import FLOAT_BOUND, SENSITIVE_BOUND
from doubleweave.check.near_ties import moved_rows
from doubleweave.check.source_run import source_logits
from doubleweave.errors import CheckError
from doubleweave.sources.hugging_face import from_module

pytestmark = pytest.mark.usefixtures("lowered_once")


def test_a_token_between_two_experts_is_not_settled():
    module = architectures.tiny_model("mixtral")
    ids = torch.arange(3, 43)[None]
    logits = source_logits(module, ids, {})
    assert (moved_rows(module, ids, {}, logits) <= FLOAT_BOUND).all()
    # The last token's second and third expert are equally good.
    router = module.model.layers[-1].mlp.gate
    taken = {}
    handle = router.register_forward_hook(lambda _, given, __: taken.update(rows=given[0].reshape(-1, 64)))
    source_logits(module, ids, {})
    handle.remove()
    row = taken["rows"][-1].detach()
    scores = router.weight.data @ row
    second, third = scores.topk(3).indices[1:]
    router.weight.data[third] += (scores[second] - scores[third]) * row / row.square().sum()
    logits = source_logits(module, ids, {})
    moved = moved_rows(module, ids, {}, logits)
    assert moved[-1] > SENSITIVE_BOUND
    assert (moved[:-1] <= FLOAT_BOUND).all()


@dataclass
class Few:
    """Rows move as a test says, whatever the model does: those of `rows` by `far`, the others not at all."""

    rows: list[int]
    far: float = 1.0

    def __call__(self, module, token_ids, cached, logits):
        moved = torch.zeros(len(logits))
        moved[self.rows] = self.far
        return moved


def test_rows_that_are_settled_must_be_right(monkeypatch, tmp_path):
    """A program that is wrong at rows 5 to 7 passes where these are unsettled, and nowhere else."""
    hold = language_model._Subject.program

    def wrong(self, program, place):
        found = hold(self, program, place)
        if place.start == 0:
            found[5:8] += found.abs().max()
        return found

    monkeypatch.setattr(language_model._Subject, "program", wrong)
    source = from_module(architectures.tiny_model("qwen3"), "toy", None)

    def compiled(rows):
        monkeypatch.setattr(language_model, "moved_rows", Few(rows))
        return dw.compile_llm(source, tmp_path / f"{len(rows)}", quantize="none", max_context=128)

    assert compiled([5, 6, 7]).check.unsettled == 3
    with pytest.raises(CheckError, match="from position 7 on"):
        compiled([5, 6])
    with pytest.raises(CheckError, match="from position 5 on"):
        compiled(list(range(0, 128, 2)))  # too many to say anything


def test_rows_may_be_as_far_off_as_the_source_moves(monkeypatch, tmp_path):
    hold = language_model._Subject.program

    def slightly_wrong(self, program, place):
        found = hold(self, program, place)
        found[5] += 5e-4 * found.abs().max()
        return found

    monkeypatch.setattr(language_model._Subject, "program", slightly_wrong)
    source = from_module(architectures.tiny_model("qwen3"), "toy", None)

    def compiled(rows, far):
        monkeypatch.setattr(language_model, "moved_rows", Few(rows, far))
        return dw.compile_llm(source, tmp_path / f"{far}", quantize="none", max_context=128)

    assert compiled([5], 8e-4).check.unsettled == 0
    for rows, far in (([5], 3e-4), ([4, 6], 8e-4)):
        with pytest.raises(CheckError, match="from position 5 on"):
            compiled(rows, far)
