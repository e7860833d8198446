"""Choosing tokens: greedy, nucleus, seeds, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from doubleweave.errors import InputError
from doubleweave.runtime.llm.sampling import Sampler, Sampling

LOGITS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-50, 50, width=32))
# For the draws to be compared with the argmax there must be one.
DISTINCT = st.lists(st.integers(-40, 40), min_size=1, max_size=30, unique=True).map(np.float32)


@given(LOGITS)
def test_greedy_is_the_first_largest(logits):
    assert Sampler(Sampling())(logits) == int(np.argmax(logits))


@given(DISTINCT, st.sampled_from([1e-3, 1e-30, 1e-310]))
def test_a_temperature_near_zero_is_greedy(logits, temperature):
    assert Sampler(Sampling(temperature, seed=1))(logits) == int(np.argmax(logits))


@given(DISTINCT)
def test_a_small_nucleus_is_greedy(logits):
    assert Sampler(Sampling(1.0, top_p=1e-9, seed=1))(logits) == int(np.argmax(logits))


@given(LOGITS, st.floats(0.1, 4), st.floats(0.05, 1), st.integers(0, 2**32))
def test_draws_come_from_the_nucleus(logits, temperature, top_p, seed):
    scaled = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    probabilities = scaled / scaled.sum()
    sampler = Sampler(Sampling(temperature, top_p, seed))
    for _ in range(5):
        token = sampler(logits)
        assert 0 <= token < len(logits)
        # The tokens before a kept one do not reach top_p yet.
        assert probabilities[probabilities > probabilities[token]].sum() < top_p + 1e-9


@given(LOGITS, st.integers(0, 2**32))
def test_equal_seeds_draw_equal_tokens(logits, seed):
    first, second = (Sampler(Sampling(1.3, 0.9, seed)) for _ in range(2))
    assert [first(logits) for _ in range(8)] == [second(logits) for _ in range(8)]


def test_frequencies_follow_the_softmax():
    wanted = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(Sampling(2.0, seed=0))
    logits = (2.0 * np.log(wanted)).astype(np.float32)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4)
    assert np.abs(counts / 4000 - wanted).max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"temperature: found -1\.0, expected 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"top_p": 0.0}, r"top-p: found 0\.0, expected more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top-p: found 1\.5"),
        ({"top_p": float("nan")}, "top-p: found nan"),
        ({"seed": -3}, "seed: found -3, expected 0 or more"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Sampling(**arguments)
