"""Times that noise made odd: a profile of a busy machine says less, and never fails."""

from __future__ import annotations

import pytest

from doubleweave.measure.segments import _repeated
from doubleweave.predict.profile import Measured


def test_a_repeated_call_takes_a_share_where_the_time_is_known_and_all_of_it_where_noise_took_it():
    # So much less behind 64 tokens than behind none that behind 96 nothing is left.
    measured = Measured((1, 32), (0, 64), ((300.0, 90.0), (300.0, 90.0)))
    assert _repeated(measured, {0: [97.5], 64: [50.0]}) == (0.5, 1.0)
    # A second call that was held up takes no longer than the first.
    assert _repeated(measured, {0: [500.0], 64: [0.0]}) == (1.0, 1.0)


def test_depths_that_were_not_measured_say_nothing():
    assert _repeated(Measured((1,), (0, 64), ((1.0, 2.0),)), {0: [1.0]}) == ()


@pytest.mark.parametrize("us", [((1.0, 0.0), (1.0, 0.0)), ((0.0, 0.0), (0.0, 0.0))])
def test_times_of_nothing(us):
    assert _repeated(Measured((1, 32), (0, 64), us), {0: [1.0], 64: [1.0]}) == (1.0, 1.0)
