"""As few segments as hold the budget get more bits, the noisiest first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import toys
from doubleweave.compiler.backends.qnn.budget import _loss, mixed, within_budget
from doubleweave.errors import PolicyError
from exports import split_of

NAMES = ("block_0", "block_1", "block_2")


def greedy_chunks():
    """What the model finds likeliest, so that noise makes it less likely."""
    with torch.no_grad():
        ids = toys.module().generate(
            torch.tensor([[5, 9, 7]]), max_new_tokens=45, do_sample=False, eos_token_id=None
        )
    return list(torch.split(ids, 16, dim=1))


CHUNKS = greedy_chunks()


def noisy(split, size):
    """Each block's weights off by so much."""
    generator = torch.Generator().manual_seed(1)
    weights = dict(split.weights)
    for name in NAMES:
        weights[name] = tuple(
            weight + size * torch.randn(weight.shape, generator=generator) for weight in weights[name]
        )
    segments = tuple(replace(s, recipe=f"off by {size}") for s in split.split.segments)
    return replace(split, split=replace(split.split, segments=segments), weights=weights)


@pytest.fixture(scope="module")
def splits():
    exact = split_of(toys.module())
    return exact, noisy(exact, 0.3), noisy(exact, 1e-4)


def rise(exact, split):
    return float(torch.tensor(_loss(split, CHUNKS) - _loss(exact, CHUNKS)).expm1())


def test_the_loss_is_the_modules(splits):
    ids = torch.cat(CHUNKS, dim=1)
    with torch.no_grad():
        wanted = float(toys.module()(ids, labels=ids).loss)
    assert _loss(splits[0], CHUNKS) == pytest.approx(wanted, rel=1e-5)


def test_as_few_as_hold_the_budget(splits):
    exact, narrow, wide = splits
    snr = {"block_0": 20.0, "block_1": 5.0, "block_2": 10.0}
    rises = [
        rise(exact, mixed(narrow, wide, names)) for names in ((), ("block_1",), ("block_1", "block_2"), NAMES)
    ]
    assert rises[0] > rises[3] + 0.01
    for budget in ((rises[0] + rises[1]) / 2, rises[3] + 0.001, max(rises) + 1):
        told = []
        found = within_budget(exact, narrow, lambda: wide, snr, CHUNKS, budget, told.append)
        kept = {s.name for s in found.split.segments if s.name in NAMES and s.recipe == "off by 0.0001"}
        assert rise(exact, found) <= budget
        # The noisiest, in their order; with one less it does not hold.
        order = ("block_1", "block_2", "block_0")
        assert kept == set(order[: len(kept)])
        if kept:
            assert rise(exact, mixed(narrow, wide, order[: len(kept) - 1])) > budget
        assert told


def test_a_budget_that_nothing_holds(splits):
    exact, narrow, _ = splits
    with pytest.raises(
        PolicyError, match=r"with all of these segments in 8 bits perplexity rises by .*; expected at"
    ):
        within_budget(
            exact, narrow, lambda: narrow, dict.fromkeys(NAMES, 1.0), CHUNKS, 1e-6, lambda what: None
        )
